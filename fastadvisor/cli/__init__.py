"""The command line: ``fastadvisor train | compare | evaluate | export | replay | data check | recipes | env``.

Flags of train, compare and data check are the fields of their configuration (``flags.py``). Whatever a user can put right ends
as one sentence on stderr, exit status 2. Heavy modules (torch) are imported by the command that needs them: ``--help`` and a
mistyped flag answer at once.
"""

import errno
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fastadvisor import config, recipes
from fastadvisor.cli.flags import parse_config
from fastadvisor.cli.parser import Parser, name_settings_of_run
from fastadvisor.commands.text import format_table, result_rows
from fastadvisor.config import expand_user
from fastadvisor.errors import Interrupted, UserError, suggest, too_many_open_files
from fastadvisor.runtime import console
from fastadvisor.version import __version__

__all__ = ["main", "parse_config"]

HELP = """\
usage: fastadvisor COMMAND [flags]

Train image classifiers on wrong labels and unequal classes.

commands:
  train      train one classifier; without flags on the built-in digits data set (under a minute on two CPU cores)
  compare    train with several methods and seeds, and print a table
  evaluate   test a finished run again
  export     write the plain classifier as state dict, torch.export program and ONNX
  replay     find the first value that was not finite, after a run that stopped because of one
  data check count, open and compare all images of a data set: classes, broken files, duplicates, overlap
  recipes    list the built-in settings files for --config
  env        print versions, the device, and which optional parts are active

'fastadvisor COMMAND --help' lists a command's flags ('fastadvisor train --help-all' all of them);
'fastadvisor --version' prints the version.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 2 for what the user can put right, 128 + the signal when interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)
    console.accept_any_character()
    try:
        return run(args)
    finally:
        console.detach_dead_streams()


def run(args: list[str]) -> int:
    """Run one command; what goes wrong becomes a sentence and a status."""
    try:
        with console.show_log():
            return dispatch(args)
    except UserError as error:
        # A file's name may hold line breaks.
        print_error(f"fastadvisor: error: {' '.join(str(error).splitlines())}")
        return 2
    except Interrupted as stop:
        print_error(f"fastadvisor: {stop}")
        return 128 + stop.signal
    except KeyboardInterrupt:
        print_error("fastadvisor: interrupted.")
        return 130
    except BrokenPipeError:  # `fastadvisor recipes | head`: the reader has left
        return 141
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        print_error(f"fastadvisor: error: {too_many_open_files()}")
        return 2
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        print_error("fastadvisor: another process of this run has ended, and so does this one; its message tells why.")
        return 1


def print_error(message: str) -> None:
    """Print ``message`` to stderr; of several ranks with the same message one does."""
    if "WORLD_SIZE" in os.environ:
        from fastadvisor.runtime.ranks import claim_message

        if not claim_message(message):
            return
    console.write(message, sys.stderr)


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether ``error`` only says that another rank is gone."""
    if "WORLD_SIZE" not in os.environ:
        return False
    from fastadvisor.runtime.ranks import means_lost_rank

    return means_lost_rank(error)


def dispatch(args: list[str]) -> int:
    """Find the command and run it."""
    commands: dict[str, Callable[[list[str]], None]] = {
        "train": run_train,
        "compare": run_compare,
        "evaluate": run_evaluate,
        "export": run_export,
        "replay": run_replay,
        "data": run_data,
        "recipes": run_recipes,
        "env": run_env,
    }
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP, end="")
    elif args[0] == "--version":
        print(f"fastadvisor {__version__}")
    elif args[0] in commands:
        try:
            commands[args[0]](args[1:])
        except SystemExit as stop:  # the parsers' own way out after --help
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    elif args[0].startswith("-"):
        raise UserError(f"The command comes before the flags, as in 'fastadvisor train {args[0]}'.")
    else:
        raise UserError(f"Unknown command {args[0]!r}.{suggest(args[0], commands)} Commands: {', '.join(commands)}.")
    return 0


def run_train(args: list[str]) -> None:
    """``fastadvisor train``."""
    settings = parse_config(config.Config, "train", "Train one classifier.", args)
    from fastadvisor.commands.train import train_config
    from fastadvisor.training.messages import finished
    from fastadvisor.training.trainer import TrainResult

    result = train_config(settings)
    if not settings.progress and int(os.environ.get("RANK", "0")) == 0:  # else the run has said so itself
        result_line = finished(result.summary, result.folder) if isinstance(result, TrainResult) else result.sentence()
        console.write(result_line, sys.stdout)


def run_compare(args: list[str]) -> None:
    """``fastadvisor compare``."""
    settings = parse_config(config.CompareConfig, "compare", "Train with several methods and print a table.", args)
    from fastadvisor.commands import compare
    from fastadvisor.commands.compare import compare_config

    result = compare_config(settings)
    if not settings.progress:
        console.write(compare.format_comparison(result["rows"]), sys.stdout)


def run_evaluate(args: list[str]) -> None:
    """``fastadvisor evaluate``."""
    parser = Parser("fastadvisor evaluate", "Test a finished run again.")
    parser.add_argument("run", metavar="RUN", type=expand_user, help="the run's folder")
    parser.add_argument("--checkpoint", choices=("model", "best", "last"), default="model", help="weights (default: model)")
    parser.add_argument("--data-root", metavar="DIR", type=expand_user, help="folder of the data set, if it has moved since")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device (default: auto)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    flags = parser.parse_all(args)
    from fastadvisor.commands.evaluate import evaluate_run

    with name_settings_of_run(parser, flags.run):
        result = evaluate_run(flags.run, checkpoint=flags.checkpoint, data_root=flags.data_root, device=flags.device)
    if flags.json:
        print(json.dumps(result, indent=2))
        return
    console.log_notes(result.pop("notes"))
    print(format_table(result_rows(result)))


def run_export(args: list[str]) -> None:
    """``fastadvisor export``."""
    parser = Parser("fastadvisor export", "Write the plain classifier of a run, compared with the original on test images.")
    parser.add_argument("run", metavar="RUN", type=expand_user, help="the run's folder")
    parser.add_argument("--output", metavar="DIR", type=expand_user, help="where to (default: RUN/export)")
    parser.add_argument("--formats", default="state-dict,torch-export,onnx", help="separated by commas (default: all three)")
    parser.add_argument("--checkpoint", choices=("model", "best", "last"), default="model", help="weights (default: model)")
    parser.add_argument("--data-root", metavar="DIR", type=expand_user, help="folder of the data set, if it has moved since")
    flags = parser.parse_all(args)
    from fastadvisor.commands.export import export_run

    formats = [name.strip() for name in flags.formats.split(",") if name.strip()]
    settings = {"output": flags.output, "formats": formats, "checkpoint": flags.checkpoint, "data_root": flags.data_root}
    with name_settings_of_run(parser, flags.run):
        about = export_run(flags.run, **settings)
    console.log_notes(about["notes"])
    files = about["files"].values()
    rows = [(one["file"], f"{one['bytes'] / 1e6:.1f} MB", f"{one['largest_difference']:.1e}") for one in files]
    print(format_table([("file", "size", "difference"), *rows]))
    print(f"Compared with the original on {about['compared_on']} test images; in {flags.output or Path(flags.run, 'export')}.")


def run_replay(args: list[str]) -> None:
    """``fastadvisor replay``."""
    parser = Parser("fastadvisor replay", "Take the step again at which a run met values that are not finite.")
    parser.add_argument("run", metavar="RUN", type=expand_user, help="the run's folder")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device (default: auto)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    flags = parser.parse_all(args)
    from fastadvisor.commands.replay import replay

    with name_settings_of_run(parser, flags.run):
        result = replay(flags.run, device=flags.device)
    if flags.json:
        peaks = [(name, peak if math.isfinite(peak) else str(peak)) for name, peak in result["peaks"]]  # JSON has no NaN
        print(json.dumps({**result, "peaks": peaks}, indent=2, allow_nan=False))
        return
    print(format_table((name, f"{peak:.4g}") for name, peak in result["peaks"]))
    again = "the same" if result["found"] == result["said"] else result["found"] or "everything is finite here"
    print(f"Iteration {result['iteration']} (epoch {result['epoch']}): the run met {result['said']}; now: {again}.")
    if result["first"] is not None:
        print(f"The first output that is not finite is that of {result['first']}.")


def run_data(args: list[str]) -> None:
    """``fastadvisor data check``."""
    if args and args[0] in ("-h", "--help"):
        args = ["check", "--help"]
    if not args or args[0] != "check":
        raise UserError(
            "'fastadvisor data' has one command, check, as in 'fastadvisor data check --dataset cifar10 --data-root ROOT'."
        )
    settings = parse_config(config.CheckConfig, "data check", "Count, open and compare all images of a data set.", args[1:])
    from fastadvisor.commands.check_data import check_data
    from fastadvisor.commands.check_report import make_folder
    from fastadvisor.datasets import load_source

    if settings.output is not None:
        make_folder(Path(settings.output))  # before every image is read
    report = check_data(load_source(settings), settings)
    print(f"{report.name}: {report.classes} classes")
    print(format_table(report.rows()), format_table(report.class_rows()), sep="\n\n", end="\n\n")
    for line in report.remarks():
        print(line)
    if settings.output is not None:
        report.write(Path(settings.output))
        print(f"The report is in {settings.output}.")
    if report.problems:
        more = f" (and {len(report.problems) - 1} more, above)" if len(report.problems) > 1 else ""
        raise UserError(f"{report.problems[0]}{more}")


def run_recipes(args: list[str]) -> None:
    """``fastadvisor recipes``."""
    Parser("fastadvisor recipes", "List the settings that come along, for --config.").parse_all(args)
    print(format_table(recipe_rows()))


def run_env(args: list[str]) -> None:
    """``fastadvisor env``."""
    Parser("fastadvisor env", "Print versions, the device, and which optional parts are active.").parse_all(args)
    from fastadvisor.runtime.environment import environment, optional_parts

    print(format_table((name, "none" if value is None else str(value)) for name, value in environment().items()))
    print("\noptional parts")
    print(format_table((name, "active" if active else "inactive", why) for name, active, why in optional_parts()))


def recipe_rows() -> list[tuple[str, str]]:
    """Return each recipe's name and the comment in its first line."""
    return [(name, recipes.read(name).partition("\n")[0].removeprefix("#").strip()) for name in recipes.names()]
