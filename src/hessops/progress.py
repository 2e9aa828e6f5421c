"""Progress bars: none unless asked for, none left open after an error."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from tqdm import tqdm

_Item = TypeVar("_Item")


class _Open(threading.local):
    """The bars that a thread shows at present, the outermost first."""

    def __init__(self) -> None:
        self.bars: list[Bar] = []


_open = _Open()


class Bar:
    """A progress bar, or nothing at all; made by `progress_bar`."""

    def __init__(self, shown: tqdm[Any] | None) -> None:
        self._shown = shown

    @property
    def is_shown(self) -> bool:
        """Whether anybody looks: what is only displayed need not be computed."""
        return self._shown is not None

    def advance(self, count: float = 1) -> None:
        """Goes on by so much."""
        if self._shown is not None:
            self._shown.update(count)

    def advance_to(self, position: float) -> None:
        """Goes on to where the work is."""
        if self._shown is not None:
            self._shown.update(position - self._shown.n)

    def expect(self, total: float) -> None:
        """How much there is to do, where that is known better now."""
        if self._shown is not None:
            self._shown.total = total
            self._shown.refresh()

    def say(self, **values: object) -> None:
        """Shows some values beside the bar."""
        if self._shown is not None:
            self._shown.set_postfix(values, refresh=False)

    def close(self, *, done: bool) -> None:
        """Takes the bar off the screen; a second call does nothing.

        Args:
            done: Whether the work is: a notebook paints a bar red that ends short of its total,
                and work that converged early has not failed.
        """
        if self._shown is None:
            return
        if done and self._shown.total is not None:
            self._shown.total = max(self._shown.n, 1)
        self._shown.refresh()  # what is quick was not shown yet
        self._shown.close()
        if self in _open.bars:
            _open.bars.remove(self)


@contextmanager
def progress_bar(
    description: str, unit: str, total: float | None = None, *, show: bool, keep: bool = False
) -> Iterator[Bar]:
    """A bar on stderr, or in the cell of a notebook, that is closed however the block ends.

    Args:
        description: What is being done.
        unit: What is counted.
        total: How many there are; ``None`` where that is not known.
        show: Shows it; ``False`` writes nothing anywhere.
        keep: Leaves the last state on the screen, unless another bar was there first.

    Example:
        >>> from hessops.progress import progress_bar
        >>> with progress_bar("chunks", "chunk", 2, show=False) as bar:
        ...     bar.advance()
        >>> bar.is_shown
        False
    """
    if not show:
        yield Bar(None)
        return
    # With `None` tqdm keeps the bars that have no other one above them.
    leave = None if keep else False
    bar = Bar(_tqdm()(desc=description, unit=unit, total=total, leave=leave, dynamic_ncols=True))
    _open.bars.append(bar)
    try:
        yield bar
    except BaseException as error:
        # Whoever stops to follow has had enough; nothing went wrong.
        bar.close(done=isinstance(error, GeneratorExit))
        raise
    bar.close(done=not keep)


def followed(
    items: Iterable[_Item], description: str, unit: str, total: float | None = None, *, show: bool
) -> Iterable[_Item]:
    """The items behind a bar, or just the items."""
    return _followed(items, description, unit, total) if show else items


def _followed(
    items: Iterable[_Item], description: str, unit: str, total: float | None
) -> Iterator[_Item]:
    with progress_bar(description, unit, total, show=True) as bar:
        for item in items:
            yield item
            bar.advance()


@contextmanager
def bars_closed_on_error() -> Iterator[None]:
    """Closes the bars that were opened inside where that ends in an error.

    The traceback of an error holds the frames that it passed through, and with them a generator
    that stopped in the middle of its bar: nothing would end it.
    """
    before = list(_open.bars)
    try:
        yield
    except BaseException:
        for bar in reversed(_open.bars.copy()):
            if bar not in before:
                bar.close(done=False)
        raise


def _tqdm() -> type[tqdm[Any]]:
    """The bar of the place: widgets in a notebook that has them, text elsewhere.

    It is imported when it is needed: without ipywidgets `tqdm.auto` warns inside a notebook, where
    text will do.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="IProgress not found")
        from tqdm.auto import tqdm
    return tqdm
