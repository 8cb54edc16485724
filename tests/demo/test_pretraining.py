import json

import pytest
from PIL import Image

from vltrain.demo.pretraining import write_pretraining_data


@pytest.mark.slow
def test_what_is_written_does_not_depend_on_the_number_of_workers(tmp_path):
    texts, pictures = [], []
    for workers in (1, 2):
        out = tmp_path / str(workers)
        write_pretraining_data(out, pictures=400, workers=workers)
        texts.append((out / "train.json").read_text())
        pictures.append((out / "images" / "train-00001" / "007.bmp").read_bytes())

    assert texts[0] == texts[1]
    assert pictures[0] == pictures[1]


@pytest.mark.slow
def test_every_record_names_pictures_that_were_rendered(tmp_path):
    train, held_out = write_pretraining_data(tmp_path, pictures=200, workers=1)

    records = json.loads((tmp_path / "train.json").read_text())
    assert len(records) == train == 250  # one for each picture, and 50 comparisons
    assert held_out == 5 * 250
    for record in records:
        for turn in record["conversations"]:
            for part in turn["value"].split("<img>")[1:]:
                file = tmp_path / part.split("</img>")[0]
                assert Image.open(file).size == (112, 112)
