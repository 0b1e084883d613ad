"""Runs a mirror, and reports how it ended."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from tempfile import gettempdir

from roster.client import LoadInterrupted
from roster.errors import InvalidFilter, RosterError, Unauthenticated
from service.cli.formats import SourceError
from service.cli.mirror.difference import DISK_ERRORS, Difference
from service.cli.mirror.mirror import Mirror, PlanRefused
from service.cli.mirror.options import MirrorOptions
from service.cli.mirror.report import MirrorReport
from service.cli.rejects import RejectsFile
from service.cli.source import Source
from service.cli.terminal import Target, UsageError, echo, exit_on_signal


def run_mirror(
    source: Source, target: Target, options: MirrorOptions, rejects: RejectsFile, *, is_json: bool
) -> int:
    """Make the users that match equal to the file, and return the exit status; raises UsageError."""
    report = MirrorReport(
        source.name,
        rejects,
        has_filter=bool(options.filter),
        deactivates=options.deactivates,
        is_dry_run=options.is_dry_run,
    )
    with closing(rejects), _report_errors(report, target), closing(Difference(options.key)) as difference:
        mirror = Mirror(source, difference, options, report, rejects)
        try:
            asyncio.run(mirror.plan(target))
        except PlanRefused as refusal:
            if is_json:
                echo(json.dumps({**report.as_dict(), "error": str(refusal)}))
            raise
        if not is_json:
            echo(report.plan())
        if not options.is_dry_run:
            asyncio.run(mirror.write(target))
    if is_json:
        echo(json.dumps(report.as_dict()))
    else:
        echo(*report.lines())
    return 1 if report.outcomes["failed"] else 0


@contextmanager
def _report_errors(report: MirrorReport, target: Target) -> Iterator[None]:
    """Exit on a signal, or raise UsageError if the mirror fails; both say how far it came."""
    try:
        with exit_on_signal(lambda: f": {report.unfinished()}"):
            yield
    except PlanRefused as refusal:
        raise UsageError(f"{report.name}: {refusal}; nothing was written", *refusal.problems) from None
    except (SourceError, OSError) as error:
        raise UsageError(f"{report.name}: {error}; {report.unfinished()}") from None
    except DISK_ERRORS as error:
        cause, folder = getattr(error, "orig", error), gettempdir()
        raise UsageError(
            f"the folder for temporary files, {folder}, can't be used: {cause}; free some space, or set "
            f"TMPDIR to another folder; {report.unfinished()}"
        ) from None
    except InvalidFilter as failure:
        raise UsageError(f"--filter: {failure.message}; nothing was written") from None
    except RosterError as failure:
        cause = failure.cause if isinstance(failure, LoadInterrupted) else failure
        is_explained = not report.has_sent or isinstance(cause, Unauthenticated)
        message = target.explain(cause) if is_explained else failure.message
        raise UsageError(f"{report.name}: {message}; {report.unfinished()}") from None
