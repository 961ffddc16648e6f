"""Recipes: the shipped ones are sound, a wrong one is refused at its line, and the digest is of the meaning."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gemma_pack import recipe as recipe_module
from gemma_pack.errors import RecipeError
from gemma_pack.recipe import Recipe, load_recipe, parse_recipe, recipe_text, shipped_names, shipped_text

SOUND = """\
name: mine
summary: int4
scheme: W4A16
algorithm: gptq
calibration:
  dataset: owner/name
  samples: 4
  sequence_length: 32
gate:
  - kl_nats: 0.1
"""


def changed(old: str, new: str) -> str:
    assert SOUND.count(old) == 1
    return SOUND.replace(old, new)


def refusal(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, origin="mine.yaml")
    assert caught.value.hint == "gemma-pack recipes show w4a16 is an example"
    return caught.value.message


@pytest.mark.parametrize("name", shipped_names())
def test_every_shipped_recipe_loads_under_its_own_name(name: str):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert len(f"{name}  {recipe.summary}") <= 80, "one line of the list"
    assert recipe.gate_for(10**12), "a model of any size is judged"


@pytest.mark.parametrize("name", shipped_names())
def test_every_number_of_a_shipped_recipe_has_its_reason(name: str):
    number = re.compile(r":\s+[-+.\d][\d.e+-]*\s*(#.*)?$")
    lines = [line for line in shipped_text(name).splitlines() if not line.lstrip().startswith("#")]
    assert [line for line in lines if (match := number.search(line)) and not match[1]] == []


def test_the_shipped_recipes_are_those_of_the_source_tree():
    here = Path(__file__).parent.parent / "recipes"
    assert shipped_names() == sorted(path.stem for path in here.glob("*.yaml"))
    assert all(shipped_text(name) == (here / f"{name}.yaml").read_text("utf-8") for name in shipped_names())


def test_the_recipes_inside_a_wheel_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(SOUND, "utf-8")
    monkeypatch.setattr(recipe_module.resources, "files", lambda _package: tmp_path)
    assert shipped_names() == ["mine"]
    assert load_recipe("mine").name == "mine"


def test_a_file_is_named_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine.yaml").write_text(SOUND, "utf-8")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("mine.yaml") == load_recipe(str(tmp_path / "mine.yaml")) == parse_recipe(SOUND, origin="")
    assert recipe_text("./mine.yaml") == SOUND


def test_defaults_of_a_short_recipe():
    recipe = parse_recipe(SOUND, origin="mine.yaml")
    assert (recipe.observer, recipe.ignore, recipe.refinement) == ("memoryless_mse", (), None)
    assert recipe.calibration is not None
    assert (recipe.calibration.split, recipe.calibration.seed) == ("train", 0)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("w4a61", "did you mean w4a16?"),
        ("W4A16", "did you mean w4a16?"),
        ("w4", "did you mean w4a16?"),
        ("nope", "there are: "),
    ],
)
def test_an_unknown_name_brings_the_closest(name: str, hint: str):
    with pytest.raises(RecipeError) as caught:
        load_recipe(name)
    assert caught.value.message == f"there is no recipe named {name}"
    assert str(caught.value.hint).startswith(hint)


def test_an_unreadable_file_is_said_plainly(tmp_path: Path):
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe4")
    for path, reason in (
        ("no.yaml", "No such file or directory"),
        ("latin.yaml", "it is not UTF-8"),
        (".", "Is a dir"),
    ):
        with pytest.raises(RecipeError) as caught:
            load_recipe(f"{tmp_path}/{path}")
        assert caught.value.message.startswith(f"cannot read {tmp_path / path}: {reason}")
        assert caught.value.hint == "gemma-pack recipes lists the shipped ones"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [\n", "mine.yaml:2: not YAML: "),
        (changed("scheme: W4A16", "scheme: W3A16"), "mine.yaml:3: scheme: Input should be 'W4A16', "),
        (changed("algorithm: gptq\n", ""), "mine.yaml:1: algorithm: is missing"),
        (changed("gptq", "gptq\nalgoritm: gptq"), "mine.yaml:5: algoritm: unknown key"),
        (changed("name: mine", "name: My Recipe"), "mine.yaml:1: name: String should match pattern"),
        (changed("  samples: 4\n", ""), "mine.yaml:5: calibration.samples: is missing"),
        (changed("samples: 4", "samples: 0"), "mine.yaml:7: calibration.samples: Input should be greater than"),
        (changed("samples: 4", "samples: yes"), "mine.yaml:7: calibration.samples: Input should be a valid integer"),
        (changed("samples: 4", 'samples: "4"'), "mine.yaml:7: calibration.samples: Input should be a valid integer"),
        (changed("length: 32", "length: 8"), "mine.yaml:8: calibration.sequence_length: Input should be greater than"),
        (changed("owner/name", '""'), "mine.yaml:6: calibration.dataset: String should have at least 1 character"),
        (changed("  - kl_nats: 0.1\n", "  []\n"), "mine.yaml:9: gate: there is no row, so nothing would be judged"),
        (changed("kl_nats: 0.1", "up_to_parameters: 1.0e+9"), "mine.yaml:10: gate.0: sets no margin: give ppl_"),
        (changed("kl_nats: 0.1", "kl_nats: -0.1"), "mine.yaml:10: gate.0.kl_nats: Input should be greater than"),
        (changed("kl_nats: 0.1", "kl_nats: yes"), "mine.yaml:10: gate.0.kl_nats: is yes or no, and a number is wanted"),
        (changed("kl_nats: 0.1", "kl_nats: .inf"), "mine.yaml:10: gate.0.kl_nats: Input should be a finite number"),
        (changed("kl_nats: 0.1", "same_top1_percent: 101"), "mine.yaml:10: gate.0.same_top1_percent: Input should be"),
        (changed("0.1\n", "0.1\n  - kl_nats: 0.2\n"), "mine.yaml:9: gate: a row is never reached: sort the rows by "),
        (
            changed("kl_nats: 0.1", "{kl_nats: 1, up_to_parameters: 9}\n  - {kl_nats: 1, up_to_parameters: 9}"),
            "mine.yaml:9: gate: a row is never reached: sort the rows by ",
        ),
        (SOUND + 'ignore: ["re:("]\n', "mine.yaml:11: ignore: ( is no regular expression: missing )"),
        (SOUND + "gptq: {dampening: 0}\n", "mine.yaml:11: gptq.dampening: Input should be greater than 0"),
        (SOUND + "samples: 1\nsamples: 2\n", "mine.yaml:12: samples stands twice"),
        (changed("W4A16", "FP8_DYNAMIC\ngroup_size: 32"), "mine.yaml:1: group_size goes with W4A16 and W8A16"),
    ],
)  # fmt: skip
def test_each_mistake_is_reported_at_its_line(text: str, message: str):
    assert refusal(text).startswith(message)


def test_all_mistakes_are_reported_at_once():
    text = changed("scheme: W4A16", "scheme: W3A16").replace("samples: 4", "samples: none")
    assert [line.split(": ")[0] for line in refusal(text).splitlines()] == ["mine.yaml:3", "mine.yaml:7"]


def test_a_plain_name_is_no_regular_expression():
    assert refusal(SOUND + 'ignore: ["a(b"]\n').startswith("mine.yaml:11: ignore: a(b is no linear layer of a Gemma")
    assert refusal(SOUND + "ignore: [model.layers.0.mlp.down.proj]\n").startswith("mine.yaml:11: ignore: model.layers")


@pytest.mark.parametrize(
    "ignore",
    [
        '["re:.*layers.0[.].*"]',
        "[model.layers.3.mlp.down_proj, language_model.model.layers.3.self_attn.o_proj]",
        '["re:.*q_proj", "re:.*[kv]_proj"]',
    ],
)
def test_what_leaves_fused_layers_whole_may_be_ignored(ignore: str):
    assert parse_recipe(SOUND + f"ignore: {ignore}\n", origin="").ignore


@pytest.mark.parametrize(
    ("ignore", "message"),
    [
        ('["re:.*q_proj"]', "model.layers.0.self_attn.q_proj is ignored and model.layers.0.self_attn.k_proj is not"),
        ("[model.language_model.layers.61.mlp.up_proj]", "model.language_model.layers.61.mlp.up_proj is ignored and "),
        ("[lm_head]", "lm_head is no linear layer of a Gemma's decoder; embeddings, head and towers are never"),
        ('["re:.*embed_tokens$"]', "re:.*embed_tokens$ is no linear layer of a Gemma's decoder; embeddings, head and"),
    ],
)
def test_what_no_server_loads_is_refused_at_its_line(ignore: str, message: str):
    assert refusal(SOUND + f"ignore: {ignore}\n").startswith(f"mine.yaml:11: ignore: {message}")


def test_group_sizes_without_a_kernel_and_quantized_embeddings_are_refused_at_their_lines():
    # vLLM's Marlin kernel has groups of 32, 64 and 128 (`MARLIN_SUPPORTED_GROUP_SIZES`)
    text = changed("scheme: W4A16", "scheme: W4A16\ngroup_size: 96") + "targets: [Linear, Embedding]\n"
    first, second = refusal(text).splitlines()
    assert first.startswith("mine.yaml:4: group_size: Input should be 32, 64 or 128")
    assert second == "mine.yaml:12: targets: unknown key"


@pytest.mark.parametrize("line", ["observer: memoryless_mse", "group_size: 64"])
def test_what_has_no_effect_on_bitsandbytes_is_refused(line: str):
    text = "name: mine\nsummary: nf4\nscheme: BNB_NF4\nalgorithm: nearest\ngate: [{kl_nats: 1}]\n"
    assert parse_recipe(text, origin="").for_bitsandbytes
    assert line.partition(":")[0] in refusal(text + line + "\n")
    assert "algorithm must be nearest" in refusal(SOUND.replace("W4A16", "BNB_NF4"))


def test_the_first_row_that_holds_judges():
    text = changed("  - kl_nats: 0.1\n", "  - {up_to_parameters: 1.0e+9, kl_nats: 1}\n  - {kl_nats: 2}\n")
    recipe = parse_recipe(text, origin="mine.yaml")
    assert [recipe.gate_for(parameters).kl_nats for parameters in (1, 10**9, 10**9 + 1)] == [1, 1, 2]


def test_a_model_that_no_row_judges_is_refused():
    recipe = parse_recipe(changed("kl_nats: 0.1", "{up_to_parameters: 1.0e+9, kl_nats: 1}"), origin="mine.yaml")
    with pytest.raises(RecipeError, match=r"the gate of recipe mine has no row for a model of 9\.2 billion") as caught:
        recipe.gate_for(9_241_705_984)
    assert caught.value.hint == "end the gate with a row that has no up_to_parameters"


def reordered(value: object) -> object:
    if isinstance(value, dict):
        return {key: reordered(inner) for key, inner in reversed(value.items())}
    return [reordered(inner) for inner in value] if isinstance(value, list) else value


def test_the_digest_ignores_comments_spelling_and_the_order_of_keys():
    recipe = parse_recipe(SOUND, origin="mine.yaml")
    assert re.fullmatch("[0-9a-f]{64}", recipe.digest())
    rewritten = yaml.safe_dump(reordered(yaml.safe_load(SOUND)), sort_keys=False, default_flow_style=True)
    for text in (rewritten, "# why\n" + SOUND.replace("0.1", "1.0e-1  # why"), SOUND + "gptq: {dampening: 0.01}\n"):
        assert parse_recipe(text, origin="other.yaml").digest() == recipe.digest()


@pytest.mark.parametrize(("old", "new"), [("samples: 4", "samples: 5"), ("mine", "yours"), ("W4A16", "W8A16")])
def test_the_digest_is_of_the_meaning(old: str, new: str):
    assert parse_recipe(changed(old, new), origin="").digest() != parse_recipe(SOUND, origin="").digest()


def test_another_margin_or_summary_makes_no_other_variant():
    rewritten = changed("0.1", "0.2").replace("summary: ", "summary: other than ")
    assert parse_recipe(rewritten, origin="") != parse_recipe(SOUND, origin="")
    assert parse_recipe(rewritten, origin="").digest() == parse_recipe(SOUND, origin="").digest()


def test_a_recipe_cannot_be_changed_under_way():
    recipe = parse_recipe(SOUND, origin="mine.yaml")
    with pytest.raises(ValueError, match="frozen"):
        recipe.name = "other"  # type: ignore[misc]


@given(text=st.text(st.sampled_from(SOUND + "[]{}&*!?|>'\"#"), max_size=60), at=st.integers(0, len(SOUND)))
def test_whatever_is_written_into_a_recipe_it_is_read_or_refused_with_a_place(text: str, at: int):
    try:
        parsed = parse_recipe(SOUND[:at] + text + SOUND[at:], origin="mine.yaml")
    except RecipeError as error:
        assert re.match(r"mine\.yaml(:\d+)?: .", error.message)  # noqa: PT017 - a text may also be valid
    else:
        assert isinstance(parsed, Recipe)
