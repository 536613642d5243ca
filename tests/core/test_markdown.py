from __future__ import annotations

import re

from bfpo.core.markdown import score_cells, table
from bfpo.core.schema import Score


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_every_row_has_the_columns_of_the_head() -> None:
    lines = table(["model", "value"], [["a|b", 1], ["two\nlines\r\nhere", None], ["", 0.5]])
    assert [len(cells(line)) for line in lines] == [2] * 5
    assert set("".join(cells(lines[1]))) == {"-"}
    assert [cells(line) for line in lines[2:]] == [["a\\|b", "1"], ["two lines here", "None"], ["", "0.5"]]


def test_a_score_is_four_cells_with_or_without_value_and_interval() -> None:
    assert score_cells(Score("m", 0.25, 0.1, 0.5, 8, 2)) == ("0.250", "0.100 to 0.500", "8", "2")
    assert score_cells(Score("m", 0.25, None, None, 8)) == ("0.250", "", "8", "0")
    assert score_cells(Score("m", None, None, None, 0, 3)) == ("not measured", "", "0", "3")
