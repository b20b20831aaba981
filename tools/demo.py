#!/usr/bin/env python3
"""Shows prefill on one `vllm serve` and decode on another, from a bare machine to an answer.

Sets up .venv, makes a tiny model, starts a prefill instance (P), a decode instance (D) and vllm-router in front of
them, sends a prompt, prints the answer and what moved, does the same with a router that sends each prompt to both at
once, and stops everything.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

from bootstrap import ROOT, Environment, ensure_environment
from console import StepError, progress, run_step
from scrape import Metrics, scrape
from serving import Program, ServerSpec, ServingError, overlap_router, pd_router, post_json, read_config, vllm_server

LOGS = ROOT / "logs" / "demo"
MODELS = ROOT / "models"
# Several blocks of KV cache each. Two of them: what the first contact of P and D costs is paid once.
PROMPTS = (
    """Above the old road, where the river turns south, a small school stands among tall trees. In the morning the
children come down from the mountain, and when it is cold they run. The first to arrive makes the fire; the last has to
draw water. "Why is the night dark?" asked a girl one day, and her teacher, who had thought about it before, said that
nobody could tell her in fewer words than it takes to walk home.""",
    """Take two cities that are a day apart and a ship that sails between them. Every letter that is written in the one
must be read in the other before it can be answered. Now let the first city keep its letters until the ship has come
back and said that all of them were read: it needs a room to keep them in, and an end to its patience, because some
ships never return. How long should it wait, and what should the second city do with half a letter?""",
)
MAX_TOKENS = 24
# Prompts in a row, so that P computes for a while.
LONG = 3
REQUEST_TIMEOUT_S = 300.0
METRICS_DEADLINE_S = 15.0


def main() -> int:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, interrupt)
    try:
        print("1. Set-up", flush=True)
        environment = ensure_environment()
        model = arguments.model or make_model(environment)
        print("2. Servers", flush=True)
        with ExitStack() as stack:
            prefill, decode, router, overlapping = start_servers(environment, model, arguments.tensor_parallel, stack)
            prompts = PROMPTS if arguments.prompt is None else (arguments.prompt,)
            for number, prompt in enumerate(prompts, start=1):
                print(f"3. Request {number} of {len(prompts)}, through the router", flush=True)
                show_request(router, decode, prompt)
            print("4. A request whose legs go to both at once, through a router that does so", flush=True)
            # Of the first one it learns where P's side channel is.
            ask(overlapping, PROMPTS[0], max_tokens=1)
            show_request(overlapping, decode, " ".join(reversed(prompts)) * LONG)
            if arguments.model is None:
                print("  (the tiny model's weights are random: its answers are noise, but not chance)", flush=True)
            if arguments.keep:
                keep_serving(prefill, decode, router)
        print("Everything is stopped.", flush=True)
    except (StepError, ServingError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; everything is stopped", file=sys.stderr)
        return 130
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="directory of another model (default: a tiny one, made here)")
    parser.add_argument("--prompt", help="what to ask (default: two prompts of our own)")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="ranks of each instance (default: 1)")
    parser.add_argument("--keep", action="store_true", help="keep serving until Ctrl-C")
    arguments = parser.parse_args()
    if arguments.model is not None and not (arguments.model / "config.json").is_file():
        parser.error(f"--model: {arguments.model} has no config.json; name the directory of a Hugging Face model")
    return arguments


def interrupt(number: int, frame: FrameType | None) -> None:
    """A terminated demo stops its servers, as an interrupted one does."""
    del number, frame
    raise KeyboardInterrupt


def make_model(environment: Environment) -> Path:
    model = MODELS / "tiny-qwen3"
    if (model / "origin.json").is_file():
        print(f"  tiny model {model.relative_to(ROOT)}: present", flush=True)
        return model
    command = [str(environment.python), str(ROOT / "tools" / "tiny_model.py"), str(model)]
    run_step("make a tiny model with random weights", command, LOGS / "model.log", env=environment.variables())
    return model


def start_servers(
    environment: Environment, model: Path, tensor_parallel: int, stack: ExitStack
) -> tuple[Program, Program, Program, Program]:
    variables, bin_dir = environment.variables(), environment.directory / "bin"

    def server(name: str) -> Program:
        config = read_config(ROOT / "configs" / f"{name}.json")
        spec = ServerSpec(name, model.resolve(), config, tensor_parallel=tensor_parallel)
        return vllm_server(spec, bin_dir, LOGS, variables)

    prefill, decode = server("prefill"), server("decode")
    router = pd_router([prefill.url], [decode.url], bin_dir, LOGS, variables)
    overlapping = overlap_router(prefill.url, decode.url, bin_dir, LOGS, variables)
    for programs in ((prefill, decode), (router, overlapping)):
        for program in programs:
            program.log.unlink(missing_ok=True)
            stack.callback(program.stop)
            program.start()
        for program in programs:
            with progress(f"start {program.name} at {program.url}") as shown:
                program.wait_ready(shown=shown)
    return prefill, decode, router, overlapping


def show_request(router: Program, decode: Program, prompt: str) -> None:
    before = scrape(decode.url)
    start = time.monotonic()
    answer = ask(router, prompt, MAX_TOKENS)
    seconds = time.monotonic() - start
    usage, choices = answer["usage"], answer["choices"]
    if not isinstance(usage, dict) or not isinstance(choices, list):
        raise ServingError(f"the answer is not a completion: {answer}")
    print(f"  prompt ({usage['prompt_tokens']} tokens): {shorten(prompt)!r}")
    print(f"  answer ({usage['completion_tokens']} tokens, {seconds:.2f} s): {choices[0]['text']!r}")
    show_transfer(before, wait_for_transfer(before, decode))


def ask(router: Program, prompt: str, max_tokens: int) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    return post_json(f"{router.url}/v1/completions", body, REQUEST_TIMEOUT_S)


def wait_for_transfer(before: Metrics, decode: Program) -> Metrics:
    """D's metrics once they show the transfer; they reach the API server a moment after the answer does."""
    until = time.monotonic() + METRICS_DEADLINE_S
    name = "vllm:datadist_bytes_transferred_count"
    while True:
        after = scrape(decode.url)
        if after.total(name) > before.total(name):
            return after
        if time.monotonic() > until:
            raise ServingError(decode.describe(f"answered, but {name} says that no KV cache came from P"))
        time.sleep(0.1)


def show_transfer(before: Metrics, after: Metrics) -> None:
    def grown(name: str) -> float:
        return after.total(f"vllm:{name}") - before.total(f"vllm:{name}")

    num_bytes = grown("datadist_bytes_transferred_sum")
    copying = grown("datadist_copy_seconds_sum")
    print(f"  KV cache moved from P to D: {num_bytes / 2**20:.1f} MiB", end="")
    print(f" in {grown('datadist_blocks_transferred_sum'):.0f} blocks,", end="")
    print(f" {grown('external_prefix_cache_hits'):.0f} prompt tokens that D did not compute")
    print(f"  copy: {copying * 1e3:.2f} ms ({num_bytes / 2**20 / max(copying, 1e-9):.0f} MiB/s);", end="")
    print(f" with everything up to P's confirmation: {grown('datadist_transfer_seconds_sum') * 1e3:.2f} ms", flush=True)
    early = grown("datadist_early_bytes")
    if early:
        print(f"  of that while P was still computing: {early / 2**20:.1f} MiB", flush=True)
    meeting = grown("datadist_handshake_seconds_sum")
    if meeting:
        print(f"  first contact of the two instances, part of that: {meeting * 1e3:.2f} ms", flush=True)


def shorten(text: str, length: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[:length]}..."


def keep_serving(prefill: Program, decode: Program, router: Program) -> None:
    print(f"Serving model 'tiny' at {router.url} (P {prefill.url}, D {decode.url}). Ctrl-C ends it.", flush=True)
    while True:
        for program in (prefill, decode, router):
            if not program.alive:
                raise ServingError(program.describe("ended by itself"))
        time.sleep(1.0)


if __name__ == "__main__":
    sys.exit(main())
