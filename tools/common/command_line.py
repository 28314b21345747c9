"""Shared by all tools: the argument parser, errors as one line with exit status 2, and JSON results."""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moetrain.loggers.terminal import Terminal

Main = Callable[..., int]


def make_parser(doc: str | None, **options: Any) -> argparse.ArgumentParser:
    """A parser whose ``--help`` shows the tool's docstring as it is written."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, **options)


def reports_errors(*errors: type[Exception]) -> Callable[[Main], Main]:
    """Decorates a `main`: these errors are printed in one line and become exit status 2."""

    def decorate(main: Main) -> Main:
        @functools.wraps(main)
        def run(arguments: list[str] | None = None) -> int:
            try:
                return main(arguments)
            except errors as error:
                Terminal().error(str(error))
                return 2

        return run

    return decorate


def write_json(path: Path | None, result: Any) -> None:
    """Write a result, creating its folder; nothing where no path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
