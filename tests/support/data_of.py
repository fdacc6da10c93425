"""``[data]`` of a scenario, as readers take it."""

from __future__ import annotations

from typing import Any

from privrec.scenario.schema import Data


def data_of(source: str, **keys: Any) -> Data:
    """The table with these keys, checked as a scenario's is."""
    return Data.model_validate({"source": source, **keys})


def form(user: Any = "user", item: Any = "item", time: Any = None, **keys: Any) -> Data:
    """A source of a user's own table with these columns."""
    return data_of("table", user_column=user, item_column=item, time_column=time, **keys)
