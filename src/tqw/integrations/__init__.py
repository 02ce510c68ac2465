"""Plug-ins for other stacks. Nothing here is imported before its stack is."""
