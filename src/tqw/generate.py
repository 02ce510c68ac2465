"""Text from a model, with its chat template where it has one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tqw.errors import TqwError


def prompt_ids(tokenizer: Any, prompt: str, chat: bool = True) -> torch.Tensor:
    """int64 [1, tokens]: the prompt as the user's turn of a chat, or as plain text for base models."""
    if tokenizer is None:
        raise TqwError("expected a model with a tokenizer to generate text, but this directory has none")
    if chat and getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    return torch.tensor([tokenizer(prompt)["input_ids"]])


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 64,
    *,
    chat: bool = True,
    on_token: Callable[[str, int, int], None] | None = None,
) -> tuple[str, int]:
    """Greedy continuation of `prompt`: (text, number of new tokens)."""
    from transformers.generation.streamers import BaseStreamer

    class Counter(BaseStreamer):
        count = -1  # the prompt comes first

        def put(self, value: torch.Tensor) -> None:
            self.count += 1
            if on_token is not None and self.count > 0:
                on_token("generate", self.count, max_new_tokens)

        def end(self) -> None:
            pass

    ids = prompt_ids(tokenizer, prompt, chat).to(next(model.parameters()).device)
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False, streamer=Counter(),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )  # fmt: skip
    new = output[0, ids.shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True).strip(), len(new)
