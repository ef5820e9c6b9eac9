"""Tables of an evaluation: rounded for reading, exact for programs."""

import csv

import numpy as np

from attrib_jax.evaluation.tables import write_table


def test_markdown_is_rounded_and_csv_is_exact(tmp_path):
    rows = [
        {"method": "a", "K": 90, "dl": 1 / 3, "as_random_images": np.inf},
        {"method": "b", "K": 90, "dl": float("nan"), "as_random_images": 1234.5678},
    ]
    markdown = write_table(tmp_path, "table", rows)
    assert markdown.splitlines()[2:] == ["| a | 90 | 0.3333 | more |", "| b | 90 | - | 1235 |"]
    assert (tmp_path / "table.md").read_text() == markdown + "\n"
    with open(tmp_path / "table.csv") as file:
        first, second = csv.DictReader(file)
    assert float(first["dl"]) == 1 / 3 and float(first["as_random_images"]) == np.inf
    assert float(second["as_random_images"]) == 1234.5678 and np.isnan(float(second["dl"]))


def test_rows_of_an_unfinished_study_leave_an_earlier_table_alone(tmp_path):
    whole = [{"method": "a"}, {"method": "b"}]
    write_table(tmp_path, "table", whole)
    write_table(tmp_path, "table", whole[:1], finished=False)
    assert (tmp_path / "table.csv").read_text().splitlines() == ["method", "a", "b"]
    assert (tmp_path / "table-unfinished.csv").read_text().splitlines() == ["method", "a"]
    write_table(tmp_path, "table", whole[::-1])
    assert (tmp_path / "table.csv").read_text().splitlines() == ["method", "b", "a"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.csv", "table.md"]
