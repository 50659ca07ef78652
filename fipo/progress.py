"""Progress on screen: a bar with throughput and time left on a terminal, a plain line now and then elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

LINE_SECONDS = 15.0


def say(line: str) -> None:
    """One line to whoever watches; the result is not concerned."""
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress(title: str, total: float, unit: str) -> Iterator[Callable[[float, str], None]]:
    """Yield `advance(amount, note)`; `total` in `unit`s."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description:<9}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=Console(stderr=True)) as bars:
            task = bars.add_task(title, total=total, rate="", note="")
            start = time.monotonic()

            def advance(amount: float, note: str = "") -> None:
                bars.update(task, advance=amount, note=note)
                rate = bars.tasks[task].completed / max(1e-9, time.monotonic() - start)
                bars.update(task, rate=f"{rate:,.0f} {unit}/s")

            yield advance
        return

    start = shown = time.monotonic()
    done = 0.0

    def advance_plain(amount: float, note: str = "") -> None:
        nonlocal done, shown
        done += amount
        now = time.monotonic()
        if now - shown >= LINE_SECONDS:
            shown = now
            rate = done / (now - start)
            left = max(0.0, total - done) / rate if rate > 0 else 0.0
            print(
                f"{title}: {done / max(1, total):4.0%}  {rate:,.0f} {unit}/s  {left:.0f} s left  {note}".rstrip(),
                file=sys.stderr,
                flush=True,
            )

    yield advance_plain
    print(f"{title}: done in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
