"""The `segcore` command."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from segcore.errors import ConfigError, SegcoreError
from segcore.presets import DEFAULT_MODEL
from segcore.sampling import SamplingParams

if TYPE_CHECKING:
    from services.serving.config import ServeConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 1 for a failure, 2 for wrong arguments."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # Weights load in a second or two; their progress bars would only hide ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        return int(options.run(options))
    except SegcoreError as error:
        print(f"segcore: {error.message}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"segcore: {error.filename or ''}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="segcore", description="Language models over documents of any length.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="run a service on this machine until interrupted")
    _add_service_options(serve)
    serve.add_argument("--grpc-port", type=int, help="default: 9100")
    serve.add_argument("--http-port", type=int, help="default: 8100")
    serve.set_defaults(run=_serve)

    ask = commands.add_parser("ask", help="stream a document in, ask, and watch the answer")
    ask.add_argument("file", metavar="FILE", help="a UTF-8 text; - for standard input")
    ask.add_argument("questions", metavar="QUESTION", nargs="+", help="one or more, asked in turn")
    ask.add_argument("--address", help="a running service, HOST:PORT; default: one that is started for this call")
    ask.add_argument("--ca", type=Path, metavar="PEM", help="the service speaks TLS; whom to trust for it")
    ask.add_argument("--figures", type=Path, metavar="JSON", help="write the figures to a file, too")
    _add_service_options(ask)
    sampling = ask.add_argument_group("sampling")
    sampling.add_argument("--max-tokens", type=int)
    sampling.add_argument("--temperature", type=float, help="0 (default): greedy")
    sampling.add_argument("--top-p", type=float)
    sampling.add_argument("--top-k", type=int)
    sampling.add_argument("--seed", type=int)
    sampling.add_argument("--stop", action="append", metavar="TEXT", help="end the answer before it; repeatable")
    ask.set_defaults(run=_ask)

    token = commands.add_parser("token", help="a new bearer token for a tenant, and its hash for the tenants' file")
    token.set_defaults(run=_token)

    heads = commands.add_parser("heads", help="find the cells of a model that choose what is retrieved")
    heads.add_argument("model", metavar="MODEL", help="smollm2-135m-instruct, a directory, a .gguf file, or a hub id")
    heads.add_argument("--output", type=Path, default=Path(), metavar="FOLDER", help="default: the current one")
    heads.add_argument("--text", type=Path, metavar="FILE", help="to hide facts in; default: Python's own reference")
    heads.add_argument("--lengths", type=int, nargs="+", metavar="TOKENS", help="default: 1024 2048 4096 7168")
    heads.add_argument(
        "--depths", type=float, nargs="+", metavar="0..1", help="of the facts, 0 is oldest; default: eight"
    )
    heads.add_argument("--rounds", type=int, help="streams for each length and form of fact; default: 1")
    heads.add_argument("--seed", type=int, help="default: 0")
    heads.add_argument("--selectors", type=int, default=2, metavar="K", help="find at most so many; default: 2")
    heads.add_argument("--dtype", default="auto", help="auto (default), float32, bfloat16, ...")
    heads.set_defaults(run=_heads)

    memory = commands.add_parser("memory", help="what a model's state takes, by formula; checked against an engine")
    memory.add_argument(
        "model", metavar="MODEL", nargs="?", default=DEFAULT_MODEL, help="as for serve, or llama-3.1-8b"
    )
    memory.add_argument("--dtype", help="auto (default), float32, bfloat16, ...")
    memory.add_argument("--segment", metavar="KEY=VALUE,...", help="policy=NAME and its options")
    memory.add_argument("--sessions", type=_positive, default=1, metavar="N")
    memory.add_argument("--tokens", type=_positive, default=1_000_000, metavar="N", help="of each session")
    memory.add_argument("--no-check", action="store_true", help="formulas alone: nothing is run or measured")
    memory.set_defaults(run=_memory)

    _add_eval(commands)
    _add_train(commands)
    _add_study(commands)
    return parser


def _add_eval(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    evaluation = commands.add_parser(
        "eval",
        help="score models and policies on long-context tasks, and report",
        description=(
            "segcore eval CONFIG.yaml runs an evaluation, or goes on with it: here, or as a job of a Ray cluster;"
            " report FOLDER writes a run's report again; compare FOLDER FOLDER sets two runs side by side; follow JOB,"
            " stop JOB and list see to jobs."
        ),
    )
    evaluation.add_argument("words", metavar="CONFIG.yaml | report | compare | follow | stop | list", nargs="+")
    where = evaluation.add_mutually_exclusive_group()
    where.add_argument("--no-ray", action="store_true", help="workers are processes of this machine")
    where.add_argument(
        "--address",
        help="a Ray cluster: its dashboard's, http://HOST:8265, for a job; auto or ray://HOST:10001 to work on it from"
        " here; default: a Ray of its own",
    )
    evaluation.add_argument("--detach", action="store_true", help="submit, and don't follow")
    evaluation.set_defaults(run=_eval)

    harness = commands.add_parser(
        "lm-eval",
        help="EleutherAI's lm-evaluation-harness, with this engine as its model segcore",
        prefix_chars=chr(0),
        add_help=False,
    )
    harness.add_argument("words", nargs=argparse.REMAINDER)
    harness.set_defaults(run=_lm_eval)


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    train = commands.add_parser(
        "train",
        help="fine-tune a model on a Ray cluster, or here",
        description=(
            "segcore train CONFIG.yaml starts a run; resume CONFIG.yaml|JOB goes on with it; follow JOB, stop JOB and"
            " list see to jobs; export CHECKPOINT FOLDER copies what runs. JOB is a job's name or its run's."
        ),
    )
    train.add_argument("words", metavar="CONFIG.yaml | resume | follow | stop | list | export", nargs="+")
    where = train.add_mutually_exclusive_group()
    where.add_argument("--address", help="a Ray cluster, http://... or ray://...; default: $RAY_ADDRESS, this machine")
    where.add_argument("--local", action="store_true", help="on this machine, on a Ray of its own, until it ends")
    where.add_argument("--no-ray", action="store_true", help="on this machine, by one worker without Ray")
    train.add_argument("--detach", action="store_true", help="submit, and don't follow")
    train.set_defaults(run=_train)


def _add_study(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    study = commands.add_parser("study", help="train and judge arms that are told apart in one file")
    study.add_argument("file", type=Path, metavar="STUDY.yaml")
    study.add_argument("--arms", nargs="+", metavar="ARM", help="these alone; default: all")
    study.add_argument("--jobs", type=_positive, default=1, metavar="N", help="arms at a time; default: 1")
    study.add_argument("--minutes", type=float, default=1e6, help="then stop; the same command goes on")
    study.add_argument("--no-ray", action="store_true", help="train and judge without Ray")
    study.add_argument("--storage", type=Path, metavar="DIR", help="in place of the file's")
    study.set_defaults(run=_study)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


def _add_service_options(parser: argparse.ArgumentParser) -> None:
    service = parser.add_argument_group("service")
    service.add_argument("--config", type=Path, metavar="YAML", help="a file of service settings; see docs/serving.md")
    service.add_argument("--model", help="smollm2-135m-instruct (default), a directory, a .gguf file, or a hub id")
    service.add_argument("--adapter", metavar="DIR", help="one for the model; default: what is shipped for it; or none")
    service.add_argument("--dtype", help="auto (default), float32, bfloat16, ...")
    service.add_argument("--policy", help="segmented (default; with an adapter, the one it was trained with) or full")


def _serve(options: argparse.Namespace) -> int:
    from services.serving.local import local_service

    config = _config(options, grpc_port=options.grpc_port, http_port=options.http_port)
    with local_service(config) as address:
        page = f"{'http' if config.tls_key is None else 'https'}://{config.host}:{config.http_port}"
        print(f"segcore serves {config.model} over gRPC at {address}, a page at {page}; Ctrl-C stops it", flush=True)
        stop = threading.Event()
        for sign in (signal.SIGINT, signal.SIGTERM):
            signal.signal(sign, lambda *_: stop.set())
        stop.wait()
    return 0


def _ask(options: argparse.Namespace) -> int:
    from services.ask import ask
    from services.serving.client import Client
    from services.serving.local import local_service

    names = ("max_tokens", "temperature", "top_p", "top_k", "seed")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    params = SamplingParams(stop=tuple(options.stop or ()), **given)
    with ExitStack() as stack:
        source = sys.stdin.buffer if options.file == "-" else stack.enter_context(open(options.file, "rb"))
        size = None if options.file == "-" else os.fstat(source.fileno()).st_size
        address = options.address
        if address is None:
            print("Starting a service for this call ...", file=sys.stderr)
            address = stack.enter_context(local_service(_config(options, grpc_port=0, http_port=0)))
        client = stack.enter_context(Client(address, token=os.environ.get("SEGCORE_TOKEN"), ca=options.ca or False))
        ask(client, source, size, options.questions, params, options.figures)
    return 0


def _token(_options: argparse.Namespace) -> int:
    from services.serving.tenants import new_token, token_hash

    token = new_token()
    print(f"token: {token}\nhash: {token_hash(token)}")
    return 0


def _heads(options: argparse.Namespace) -> int:
    from segcore.heads.probes import ProbeConfig
    from services.heads import find

    names = ("lengths", "depths", "rounds", "seed")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    lists = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    find(options.model, options.output, options.text, ProbeConfig(**(given | lists)), options.selectors, options.dtype)
    return 0


def _memory(options: argparse.Namespace) -> int:
    from services.memory import memory

    wanted = {"sessions": options.sessions, "tokens": options.tokens, "check": not options.no_check}
    return memory(options.model, options.dtype, options.segment, **wanted)


def _eval(options: argparse.Namespace) -> int:
    from services.evaluation.command import run_eval

    return run_eval(options.words, options.address, no_ray=options.no_ray, detach=options.detach)


def _lm_eval(options: argparse.Namespace) -> int:
    try:
        from services.evaluation.harness import main as harness
    except ImportError as error:
        raise ConfigError("lm-evaluation-harness isn't installed: pip install 'segcore[lm-eval]'") from error
    return harness(options.words)


def _train(options: argparse.Namespace) -> int:
    from services.training.commands import train

    return train(
        options.words, address=options.address, local=options.local, no_ray=options.no_ray, detach=options.detach
    )


def _study(options: argparse.Namespace) -> int:
    from services.study import Study, Work

    until = time.monotonic() + 60 * options.minutes
    study = Study.read(options.file, options.storage)
    if unknown := set(options.arms or ()) - set(study.arms):
        raise ConfigError(f"{options.file} has no arm {', '.join(sorted(unknown))}; it has {', '.join(study.arms)}")
    names = [name for name in study.arms if not options.arms or name in options.arms]
    done = Work(study, ray=not options.no_ray, until=until).all(names, options.jobs)
    print(f"{study.folder / 'study.md'}\n{(study.folder / 'study.md').read_text()}")
    return 0 if done else 1


def _config(options: argparse.Namespace, **given: int | None) -> ServeConfig:
    from services.serving.config import ServeConfig

    config = ServeConfig() if options.config is None else ServeConfig.read(options.config)
    named = {**given, "model": options.model, "adapter": options.adapter, "dtype": options.dtype}
    values = config.model_dump() | {name: value for name, value in named.items() if value is not None}
    if options.policy:
        values["segment"] = {**values["segment"], "policy": options.policy}
    return ServeConfig(**values)


if __name__ == "__main__":
    sys.exit(main())
