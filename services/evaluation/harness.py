"""EleutherAI's lm-evaluation-harness drives our engine: model "segcore", for every task of theirs.

`segcore lm-eval run --model segcore --model_args pretrained=MODEL,policy=POLICY,... --tasks ...` is their command with
this model registered; in Python, importing this module registers it.
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lm_eval.models  # noqa: F401 - theirs, which are looked for only while none is registered
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from segcore.config import GIB, CacheConfig, EngineConfig
from segcore.engine.engine import Engine
from segcore.presets import DEFAULT_MODEL, model_segment
from segcore.reading import read
from segcore.sampling import SamplingParams
from segcore.text import AnswerText
from segcore.weights import load_model
from services.evaluation.generation import generate

Pair = tuple[tuple[str, str], list[int], list[int]]


@register_model("segcore")
class SegcoreLM(TemplateLM):  # type: ignore[misc]
    """A model under a policy. Streams too long for the policy are errors, and are never cut; only texts whose rolling
    likelihood is asked for are read in windows then, as the harness has it.

    pretrained: as `segcore serve` takes a model. policy and other words: of the segment, as in its configuration. The
    prefix is chosen anew where a prompt ends, before the assistant's header if it has one, as a service does.
    """

    def __init__(
        self,
        pretrained: str = DEFAULT_MODEL,
        *,
        dtype: str = "auto",
        device: str | None = None,
        adapter: str | None = None,
        heads: str | None = None,
        preset: Literal["default", "paper"] = "default",
        past_gib: float = 8,
        max_gen_toks: int = 256,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **segment: Any,
    ) -> None:
        super().__init__()
        if device is None or not torch.cuda.is_available():  # the command names a GPU, though there is none
            device = "auto"
        self._model = load_model(pretrained, dtype=dtype, device=device, adapter=adapter)
        file = None if heads is None else Path(heads)
        self._segment = model_segment(pretrained, segment, preset=preset, adapter=adapter, heads=file)
        self._past_bytes, self._max_gen_toks = int(past_gib * GIB), max_gen_toks
        cache = CacheConfig(host_bytes=self._past_bytes)
        config = EngineConfig(segment=self._segment, cache=cache, slots=2)
        self._engine = Engine(self._model.lm, self._model.identified(config))
        self.tokenizer = self._model.tokenizer.tokenizer
        special = self.tokenizer("", verbose=False)["input_ids"]
        self._head = [token for token in special if token != self.tokenizer.eos_token_id]

    def close(self) -> None:
        self._engine.shutdown()

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        return self._head[0] if self._head else self.eot_token_id

    @property
    def max_gen_toks(self) -> int:
        return self._max_gen_toks

    @property
    def tokenizer_name(self) -> str:
        return f"{self._model.name} {self._model.tokenizer.digest}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Special tokens may be written out in it, as a chat template does."""
        tokens: list[int] = self.tokenizer.encode(string, add_special_tokens=False, verbose=False)
        if add_special_tokens is False or tokens[: len(self._head)] == self._head:
            return tokens
        return [*self._head, *tokens]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        render = partial(self.tokenizer.apply_chat_template, chat_history, tokenize=False)
        made = render(add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt)
        return str(made)

    def _loglikelihood_tokens(
        self, requests: list[Pair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found = []
        for texts, context, continuation in tqdm(requests, desc="segcore", disable=disable_tqdm):
            found.append(self._likelihood(context, continuation, mark=self._mark(context)))
            self.cache_hook.add_partial("loglikelihood", texts, found[-1])
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        found = []
        for (text,) in tqdm([request.args for request in requests], desc="segcore", disable=disable_tqdm):
            windows = self._windows(self.tok_encode(text, add_special_tokens=False))
            found.append(sum(self._likelihood(context, new)[0] for context, new in windows))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        found = []
        for context, wanted in tqdm([request.args for request in requests], desc="segcore", disable=disable_tqdm):
            found.append(self._generated(self.tok_encode(context), dict(wanted)))
            self.cache_hook.add_partial("generate_until", (context, wanted), found[-1])
        return found

    def _likelihood(self, context: list[int], continuation: list[int], mark: int | None = None) -> tuple[float, bool]:
        tokens = torch.tensor([*context, *continuation])
        policy, past_bytes = self._segment, self._past_bytes
        found = read(self._model.lm, policy, tokens, first=len(context), mark=mark, past_bytes=past_bytes)
        return -float(found.losses_T.sum()), bool(found.greedy_T.all())

    def _windows(self, tokens: list[int]) -> Iterable[tuple[list[int], list[int]]]:
        """Of what is to be predicted, after what; all at once, unless the policy has positions for less."""
        most = self._engine.max_stream_tokens
        if len(tokens) < most:
            return [([self.prefix_token_id], tokens)]
        windows = get_rolling_token_windows(tokens, self.prefix_token_id, max_seq_len=most - 1, context_len=1)
        return map(make_disjoint_window, windows)

    def _mark(self, prompt: list[int]) -> int:
        """Where the turn that a prompt asks in ends: before the assistant's header, or before the last token."""
        header = self._model.chat.header
        return len(prompt) - (len(header) if header and prompt[-len(header) :] == header else 1)

    def _generated(self, prompt: list[int], wanted: dict[str, Any]) -> str:
        until = wanted.get("until") or []
        params = SamplingParams(
            max_tokens=int(wanted.get("max_gen_toks", self._max_gen_toks)),
            temperature=float(wanted.get("temperature", 1.0)) if wanted.get("do_sample") else 0.0,
            top_p=float(wanted.get("top_p", 1.0)),
            top_k=int(wanted.get("top_k", 0)),
        )
        text = AnswerText(self._model.tokenizer, self._model.end_tokens, [until] if isinstance(until, str) else until)
        session, mark = uuid.uuid4().hex, self._mark(prompt)
        self._engine.open(session)
        try:
            return generate(self._engine, session, prompt[:mark], prompt[mark:], params, text).text
        finally:
            self._engine.close(session)


def main(words: Sequence[str]) -> int:
    """Their command, with our model."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm-eval", *words]
    cli_evaluate()
    return 0
