"""What a table looks like: its separator, its header, and which column is which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from privrec.data.sniff import look_at
from privrec.errors import DataError

ROLES = ("user", "item", "time", "rating", "title")


def columns(path: Path, **given: Any) -> list[Any]:
    keys = look_at(path, given).keys
    return [keys.get("separator"), *(keys.get(f"{role}_column") for role in ROLES)]


TABLES: dict[str, tuple[str, list[Any]]] = {
    "MovieLens": (
        "userId,movieId,rating,timestamp\n1,31,2.5,1260759144\n",
        [",", "userId", "movieId", "timestamp", "rating", None],
    ),
    "Book-Crossing": (
        '"User-ID";"ISBN";"Book-Rating"\n"276725";"034545104X";"0"\n',
        [";", "User-ID", "ISBN", None, "Book-Rating", None],
    ),
    "RecBole": (
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n196\t242\t3\t881250949\n",
        ["\t", "user_id:token", "item_id:token", "timestamp:float", "rating:float", None],
    ),
    "Online Retail": (
        "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country\n"
        "536365,85123A,HANGING HEART,6,12/1/2010 8:26,2.55,17850,United Kingdom\n",
        [",", "CustomerID", "StockCode", "InvoiceDate", None, "Description"],
    ),
    "Retailrocket": (
        "timestamp,visitorid,event,itemid,transactionid\n1433221332117,257597,view,355908,\n",
        [",", "visitorid", "itemid", "timestamp", None, None],
    ),
    "Amazon": (
        "A2CX7LUOHB2NDG,0321732944,5.0,1341100800\nAAN,0439886341,1.0,1367193600\n",
        [",", 1, 2, 4, 3, None],
    ),
    "u.data": ("196\t242\t3\t881250949\n186\t302\t3\t891717742\n", ["\t", 1, 2, 4, 3, None]),
    "ratings.dat": ("1::1193::5::978300760\n1::661::3::978302109\n", ["::", 1, 2, 4, 3, None]),
    "check-ins": (
        "0|22847|2010-10-19T23:55:27Z\n0|42032|2010-10-18T22:17:43Z\n",
        ["|", 1, 2, 3, None, None],
    ),
    "pairs": ("7,8\n7,9\n", [",", 1, 2, None, None, None]),
    "a comma in a cell": (
        "user;item;note\n1;2;a, b\n1;3;c\n1;4;d, e, f, g\n",
        [";", "user", "item", None, None, None],
    ),
    "a track and its artist": (
        "user_name|track_name|artist_id|track_id\nann|Ah|1|2\n",
        ["|", "user_name", "track_id", None, None, "track_name"],
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_columns_are_found_as_people_name_them(name: str, tmp_path: Path) -> None:
    text, wanted = TABLES[name]
    path = tmp_path / "t.csv"
    path.write_text(text)
    assert columns(path) == wanted


def test_a_schema_names_the_columns_of_parquet(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    table = pyarrow.table({"asin": ["a"], "reviewerID": ["r"], "overall": [5.0], "n": [1]})
    pyarrow.parquet.write_table(table, path)
    assert columns(path) == [None, "reviewerID", "asin", None, "overall", None]


def test_what_is_said_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("who,user,item,at\na,1,2,3\n")
    found = look_at(path, {"user_column": "who", "time_column": "at", "min_user": 2})
    assert found.keys["user_column"] == "who"
    assert found.keys["min_user"] == 2
    assert ("time", "at", "said") in found.reasons
    assert ("item", "item", "its name") in found.reasons


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "who,what\na,1\nb,2\n",
            "columns 'who', 'what'; .* column of users; .*user_column=NAME",
        ),
        ("user,what\na,1\nb,2\n", "columns 'user', 'what'; none of them .*of items; .*item_column"),
        ("just a text\nof lines\n", "line 1 is 'just a text'; .*data.separator=CHARACTER"),
        ("", "the file is empty"),
    ],
)
def test_what_is_not_recognised_is_asked_for(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=says):
        look_at(path)
