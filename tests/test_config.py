"""A configuration is checked when it is made, and its errors say what to type."""

import json

import pytest

from intruder import InputError
from intruder.config import check_out, make_config, once, parse_setting, read_config


def test_defaults_presets_and_differences_stack():
    """A preset changes defaults, given values win, and alpha is 2r unless given."""
    config = make_config({"preset": "minilm", "rank": 4, "steps": 7})
    assert (config.task, config.steps, config.alpha, config.dropout) == ("sst2", 7, 8.0, None)
    assert make_config({"rank": 4, "alpha": 16}).alpha == 16.0
    assert make_config({"method": "full"}).alpha is None


def test_run_names():
    """Reported runs are named by method and seed, trials by method and rate."""
    assert make_config({"rank": 8, "seed": 3}).run == "lora-r8-s3"
    assert make_config({"method": "full", "stage": "tuning", "learning_rate": 1e-4}).run == "full-lr0.0001"


@pytest.mark.parametrize(("values", "message"), [
    ({"learning_rat": 1e-3}, "'learning_rat' is unknown; did you mean 'learning_rate'"),
    ({"method": "qlora"}, "'qlora'; wanted one of full, lora, head"),
    ({"method": "lora"}, "rank is missing.*--set rank=8"),
    ({"method": "full", "rank": 4}, "rank is 4"),
    ({"rank": 0}, "rank is 0; wanted 1 or more"),
    ({"rank": 2.5}, "rank is 2.5; wanted int or null"),
    ({"rank": True}, "rank is True"),
    ({"rank": 8, "learning_rate": 0}, "learning_rate is 0.0; wanted a positive"),
    ({"rank": 8, "learning_rate": float("nan")}, "learning_rate is nan"),
    ({"rank": 8, "task": "mnli"}, "'mnli'"),
    ({"rank": 8, "preset": "nanoo"}, "'nanoo'"),
    ({"rank": 8, "warmup_ratio": 1.5}, "warmup_ratio is 1.5"),
    ({"rank": 8, "gradient_accumulation": 3}, "splits evenly"),
    ({"rank": 8, "steps": "many"}, "steps is 'many'; wanted int"),
    ({"rank": 8, "seed": 2**32}, "seed is 4294967296; wanted 0 to 4294967295"),
    ({"rank": 8, "seed": -1}, "seed is -1"),
    ({"rank": 8, "learning_rate": 10**400}, "learning_rate is 1000"),
    ({"rank": 8, "max_length": 3}, "max_length is 3; wanted 8 or more"),
    ({"rank": 8, "data": "folder"}, "data is 'folder' with task nli"),
    ({"preset": ["nano"]}, r"preset is \['nano'\]"),
])
def test_bad_values_are_refused_by_name(values, message):
    """Each names the key, the value and what was wanted."""
    with pytest.raises(InputError, match=message):
        make_config(values)


def test_settings_are_json_where_they_can_be():
    """Numbers, booleans and null keep their type; words stay words."""
    texts = ("a=8", "a=1e-3", "a=true", "a=null", "a=full")
    assert [parse_setting(text)[1] for text in texts] == [8, 1e-3, True, None, "full"]
    with pytest.raises(InputError, match="'rank' is not key=value"):
        parse_setting("rank")


def test_a_file_must_hold_one_object(tmp_path):
    """Missing, broken and a list: three different messages."""
    with pytest.raises(InputError, match="no configuration file"):
        read_config(tmp_path / "none.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        read_config(tmp_path / "x.json")
    (tmp_path / "x.json").write_text(json.dumps([1]))
    with pytest.raises(InputError, match="holds a list"):
        read_config(tmp_path / "x.json")


def test_two_configurations_differ_in_digest_when_anything_differs():
    """The digest covers every field, so a checkpoint cannot be continued under other settings."""
    assert make_config({"rank": 8}).digest() == make_config({"rank": 8}).digest()
    assert make_config({"rank": 8}).digest() != make_config({"rank": 8, "weight_decay": 0.1}).digest()


def test_a_key_given_twice_is_refused(tmp_path):
    """On the command line and in a file: which of the two values was meant cannot be known."""
    with pytest.raises(InputError, match="'rank' is given twice, as 2 and 4"):
        once([("rank", 2), ("rank", 4)])
    (tmp_path / "x.json").write_text('{"rank": 2, "rank": 4}')
    with pytest.raises(InputError, match="x.json: key 'rank' is given twice"):
        read_config(tmp_path / "x.json")


def test_the_configuration_that_the_error_names_is_there_and_valid(repository, tmp_path):
    """Who types what the message proposes gets a run."""
    with pytest.raises(InputError) as caught:
        read_config(tmp_path)
    name = str(caught.value).split("such as ")[1]
    assert make_config(read_config(repository / name)).run == "lora-r8-s0"


def test_a_folder_to_write_to_is_checked_without_being_made(tmp_path):
    """A file, and a folder below a file, are refused; a folder that can be made is not made yet."""
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="file' is a file; wanted a folder"):
            check_out(out)
    check_out(tmp_path / "new" / "deep")
    assert not (tmp_path / "new").exists()
