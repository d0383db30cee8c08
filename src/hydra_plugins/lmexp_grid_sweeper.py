"""The sweeper of ranges and choices, where Hydra looks for plugins."""

from __future__ import annotations

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper


class GridSweeper(BasicSweeper):
    """Hydra's own, which composes every job's config once to see that it can be.

    The launcher composes and checks them all before it starts any.
    """

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Leave it to the launcher."""
