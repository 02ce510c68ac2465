"""Registers the transformers plug-in when, and only when, the program itself imports transformers.

transformers finds third-party quantizers by registration alone. Importing it takes seconds, so `import tqw` does not:
it waits for `transformers.quantizers.auto` to be imported and registers right after.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_WATCHED = "transformers.quantizers.auto"
_PLUGIN = "tqw.integrations.transformers"


class _ThenRegister(Loader):
    """The module's own loader, and the plug-in after it."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        import_module(_PLUGIN)


class _Watch(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        if fullname != _WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


def register() -> None:
    """Once for each process; a second call finds the plug-in or the watch in place."""
    if _WATCHED in sys.modules:
        import_module(_PLUGIN)
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())
