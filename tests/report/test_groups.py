"""Groups in the files of an attribution: top.csv, groups.csv and the page; none where the data set names none."""

import csv

import numpy as np
import pytest

from attrib_jax.attribute import attribute_to_files
from attrib_jax.attribution.groups import GroupShare, group_shares
from attrib_jax.data.concat import concatenate
from attrib_jax.data.sources import ArrayDataset
from attrib_jax.jobs.query import Query
from attrib_jax.methods import method_config
from attrib_jax.report.page import render_report
from attrib_jax.storage.stage_root import StageRoot

NAMES = ["Ann", "Bob, B.", "(none)"]


def grouped(dataset, group_names=None):
    images = np.stack([dataset[place].image for place in range(12)])
    captions = [dataset.captions(place) for place in range(12)]
    return ArrayDataset(images, captions, group_names=group_names)


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_files_tell_each_groups_part_and_nothing_without_groups(pipeline, dataset, tmp_path):
    names = NAMES * 4
    query, config = Query("a red heart", image=dataset[9].image), method_config("random")
    outputs = {}
    for kind, data in (("plain", grouped(dataset)), ("named", grouped(dataset, names))):
        root = StageRoot(tmp_path / kind)
        (result,) = attribute_to_files(pipeline, data, [query], config, root, names=["q"], model_name="tiny", top_k=5)
        outputs[kind] = result.folder
    scores = result.scores
    top = rows_of(outputs["named"] / "top.csv")
    assert [row["group"] for row in top] == [names[int(row["row_id"])] for row in top]
    shares = group_shares([names[row] for row in scores.row_id], scores.score)
    assert [GroupShare(row["group"], int(row["images"]), *(float(row[field]) for field in GroupShare._fields[2:]))
            for row in rows_of(outputs["named"] / "groups.csv")] == shares  # fmt: skip
    page = (outputs["named"] / "report.html").read_text()
    assert all(f'<th scope="row">{name}</th>' in page for name in NAMES) and page.count('id="groups"') == 1
    # Without: no file, no column, no section; and what an earlier run left goes.
    assert not (outputs["plain"] / "groups.csv").exists()
    assert (outputs["plain"] / "top.csv").read_text().splitlines()[0] == "rank,row_id,score,caption"
    assert 'id="groups"' not in (outputs["plain"] / "report.html").read_text()
    (outputs["plain"] / "groups.csv").write_text("old")
    attribute_to_files(
        pipeline, grouped(dataset), [query], config, StageRoot(tmp_path / "plain"), names=["q"], model_name="tiny"
    )
    assert not (outputs["plain"] / "groups.csv").exists()


def test_joined_data_sets_keep_their_groups(dataset):
    plain, named = grouped(dataset), grouped(dataset, NAMES * 4)
    assert concatenate(plain, plain).group_names is None
    assert concatenate(plain, named).group_names == ["(none)"] * 12 + NAMES * 4
    with pytest.raises(ValueError, match="group_names has 2 entries; expected 12"):
        grouped(dataset, ["a", "b"])


def test_a_page_shows_the_largest_groups_and_escapes_their_names(make_report):
    shares = [GroupShare(f"<g{place}>", 3, 1.0, 0.5, 0.01, 0.0, 0.02) for place in range(30)]
    page = render_report(make_report(group_shares=shares))
    assert "&lt;g19&gt;" in page and "&lt;g20&gt;" not in page and "<g1>" not in page
    assert "The 20 largest of 30" in page and "1.0 %" in page
