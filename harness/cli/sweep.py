"""`sweep`: a grid of methods, budgets and benchmarks."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.harness.cli.arguments import (
    EXIT_FAILED_CELLS,
    EXIT_OK,
    PROGRAM,
    Parser,
    add_existing_flag,
    add_weight_flags,
    example,
    screen_width,
    show,
    spec_from,
)
from visionselector_eval.harness.cli.flags import add_flags

log = logging.getLogger(__name__)


def parser() -> Parser:
    from visionselector_eval.harness.sweep.spec import SweepSpec

    parser = Parser(
        prog=f"{PROGRAM} sweep",
        description="Answer every benchmark with every method at every budget, and print a leaderboard.\n"
        "Without flags: the embedded checkpoint on the embedded benchmarks. Run it again to resume.",
        epilog=example(
            "sweep --limit 4",
            "sweep --pretrained Qwen/Qwen2.5-VL-7B-Instruct --methods visionselector divprune visionzip "
            "--budgets 0.3 0.2 0.1 --suite visionselector13",
            "sweep --methods divprune:upstream_exact=true random --budgets 20% 64tok --tasks tiny_chartqa --dry-run",
        ),
    )
    parser.add_argument("--spec", metavar="FILE", help="YAML with the fields below; flags win over it")
    add_flags(parser, {"sweep": SweepSpec})
    add_weight_flags(parser)
    parser.add_argument(
        "--engine", default="local", metavar="NAME", help="local (this process) or ray (default: local)"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="workers of engine ray (default: one for each GPU)")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the cells, what they share and what is done; run nothing"
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="then measure each cell's time, memory and tokens, alone, on up to 8 documents of its task",
    )
    for flag, what in (("repeats", "timed rounds of every cell"), ("warmup", "rounds before them")):
        help_text = f"with --profile: {what} (default: as for `profile`)"
        parser.add_argument(f"--profile-{flag}", type=int, metavar="N", help=help_text)
    add_existing_flag(
        parser,
        {
            "keep": "finished cells of this sweep are kept, the rest runs; cells made with other settings are refused",
            "replace-stale": "also forget cells made with other settings, such as an older version of this package or "
            "other weights",
            "overwrite": "forget this sweep's cells first",
        },
    )
    return parser


def run(arguments: argparse.Namespace) -> int:
    from visionselector_eval.harness.report.leaderboard import write
    from visionselector_eval.harness.report.render import RENDERERS, terminal
    from visionselector_eval.harness.store.run import Run
    from visionselector_eval.harness.sweep.engines import engine
    from visionselector_eval.harness.sweep.plan import plan
    from visionselector_eval.harness.sweep.run import run_sweep
    from visionselector_eval.harness.sweep.screen import SweepScreen, render_plan

    spec = spec_from(arguments)
    chosen, measuring = engine(arguments.engine, arguments.workers), _profile_plan(arguments)
    if arguments.dry_run:
        folder = spec.folder()
        run = Run(folder) if folder.is_dir() else None
        show(render_plan(plan(spec, run, chosen.device(spec.device))))
        return EXIT_OK
    with SweepScreen() as screen:
        run, result = run_sweep(
            spec,
            engine=chosen,
            existing=arguments.existing,
            progress=screen,
        )
    show(terminal(write(run.folder), screen_width()))
    show(f"\nrun folder: {run.folder} ({', '.join(f'leaderboard.{ending}' for ending in RENDERERS)})")
    unmeasured = (
        _profile_of_sweep(spec, run, measuring, arguments.existing == "overwrite") if measuring is not None else 0
    )
    if result.failed:
        log.error(
            "%d of %d cells failed; run the same command again to retry them", len(result.failed), screen.total_cells
        )
    return EXIT_FAILED_CELLS if result.failed or unmeasured else EXIT_OK


def _profile_plan(arguments: argparse.Namespace) -> Any:
    """How `--profile` measures, None without it; a mistake shows before the sweep runs."""
    given = {name: getattr(arguments, f"profile_{name}") for name in ("repeats", "warmup")}
    given = {name: value for name, value in given.items() if value is not None}
    if not arguments.profile:
        if given:
            raise InputError(f"--profile-{next(iter(given))} goes with --profile")
        return None
    if arguments.engine != "local":
        raise InputError("--profile measures on this machine alone: leave --engine out, and profile a finished sweep")
    from visionselector_eval.harness.profiler.run import plan_of
    from visionselector_eval.harness.profiler.spec import ProfileSpec

    return plan_of(ProfileSpec.make(given))


def _profile_of_sweep(spec: Any, run: Any, measuring: Any, overwrite: bool) -> int:
    """Measure a sweep's cells and print the tables; returns how many could not be measured."""
    from visionselector_eval.harness.profiler.screen import ProfileScreen
    from visionselector_eval.harness.profiler.sweeps import profile_sweep

    with ProfileScreen() as screen:
        done = profile_sweep(spec, run, measuring, overwrite=overwrite, progress=screen)
    for one in done:
        show(f"\n{one.text}\nprofile: {one.folder}")
    return sum(len(one.failed) for one in done)
