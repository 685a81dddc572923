import pytest

from zoo.errors import UserError
from zoo.recipe.merge import Draft, dotted


def draft(config, file="base.yaml"):
    places = {(): f"{file}:1"}

    def mark(node, path):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            places[(*path, key)] = f"{file}:{dotted((*path, key))}"
            if isinstance(value, dict | list):
                mark(value, (*path, key))

    mark(config, ())
    return Draft(config, places)


def test_mappings_merge_and_everything_else_is_replaced():
    under = draft({"a": {"b": 1, "c": [1, 2]}, "d": 3})
    under.lay(draft({"a": {"c": [9], "e": 4}, "d": {"f": 5}}, "top.yaml"))
    assert under.config == {"a": {"b": 1, "c": [9], "e": 4}, "d": {"f": 5}}
    assert under.where(("a", "b")) == "base.yaml:a.b"
    assert under.where(("a", "c", 0)) == "top.yaml:a.c.0"
    assert under.where(("a", "c", 1)) == "top.yaml:a.c", "the base's second element is gone, and its line with it"


@pytest.mark.parametrize("name", ["class_path", "family", "variant"])
def test_another_class_or_network_starts_without_the_arguments_of_the_first(name):
    under = draft({"s": {name: "A", "init_args": {"x": 1}}})
    under.lay(draft({"s": {name: "B"}}))
    assert under.config == {"s": {name: "B"}}


def test_the_same_class_keeps_its_arguments():
    under = draft({"s": {"class_path": "A", "init_args": {"x": 1}}})
    under.lay(draft({"s": {"class_path": "A", "init_args": {"y": 2}}}))
    assert under.config["s"]["init_args"] == {"x": 1, "y": 2}


def test_plus_appends_at_any_depth_and_keeps_both_lines():
    under = draft({"a": {"b": [{"n": 1}]}})
    under.lay(draft({"a": {"b+": [{"n": 2}], "new+": [3]}}, "top.yaml"))
    assert under.config == {"a": {"b": [{"n": 1}, {"n": 2}], "new": [3]}}
    assert under.where(("a", "b", 0, "n")) == "base.yaml:a.b.0.n"
    assert under.where(("a", "b", 1, "n")) == "top.yaml:a.b+.0.n"


def test_equal_replaces_a_mapping():
    under = draft({"a": {"b": {"c": 1}}})
    under.lay(draft({"a": {"b=": {"d": 2}}}, "top.yaml"))
    assert under.config == {"a": {"b": {"d": 2}}}
    assert under.where(("a", "b", "d")) == "top.yaml:a.b=.d"
    assert under.where(("a", "b", "c")) == "top.yaml:a.b=", "the base's line is gone"


def test_the_smoke_block_keeps_its_signs_until_it_is_laid_itself():
    under = draft({"a": [1], "b": {"c": 1}})
    under.lay(draft({"smoke": {"a+": [2], "b=": {"d": 2}}}, "top.yaml"))
    block = under.config.pop("smoke")
    assert block == {"a+": [2], "b=": {"d": 2}}
    under.lay(Draft(block))
    assert under.config == {"a": [1, 2], "b": {"d": 2}}


def test_plus_inside_a_replaced_mapping_is_a_plain_list():
    under = draft({"a": 1})
    under.lay(draft({"a": {"b+": [1]}}))
    assert under.config == {"a": {"b": [1]}}


@pytest.mark.parametrize(("base", "value"), [({"a": 1}, [2]), ({"a": [1]}, 2)])
def test_plus_on_something_else_than_lists_is_refused(base, value):
    with pytest.raises(UserError, match=r"top.yaml:a\+: a\+ appends to a list"):
        draft(base).lay(draft({"a+": value}, "top.yaml"))


def test_a_key_that_is_no_text_is_refused():
    with pytest.raises(UserError, match=r"top\.yaml:1: the key True must be text"):
        draft({}).lay(draft({True: 1}, "top.yaml"))


def test_overrides_reach_mappings_and_list_elements():
    found = draft({"a": {"stages": [{"n": 1, "m": 2}, 7]}})
    found.override("a.stages.0.n", 5, "override 1")
    found.override("a.stages.1", {"n": 8}, "override 2")
    assert found.config == {"a": {"stages": [{"n": 5, "m": 2}, {"n": 8}]}}
    assert found.where(("a", "stages", 0, "n")) == "override 1"
    assert found.where(("a", "stages", 1, "n")) == "override 2"
    assert not found.added


def test_a_class_may_get_its_first_argument_and_a_new_class_drops_the_old_ones():
    found = draft({"s": {"class_path": "A"}})
    found.override("s.init_args.x", 1, "first")
    assert found.config["s"]["init_args"] == {"x": 1}
    assert found.added == ["first"], "only the signature can tell whether x exists"
    found.override("s.class_path", "B", "second")
    assert found.config == {"s": {"class_path": "B"}}


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("a.bb.c", "a has no 'bb'. Did you mean 'b'?"),
        ("a.list.4.n", "a.list is a list of 1, so '4' is none of its elements"),
        ("a.list.n", "a.list is a list of 1, so 'n' is none of its elements"),
        ("a.null.x", "a.null is None and has no 'x'; give a.null whole"),
        ("s.init_arg", "s has no 'init_arg'. Did you mean 'init_args'?"),
        ("vars.widht", "vars has no 'widht'. Did you mean 'width'?"),
    ],
)
def test_a_key_that_leads_nowhere_is_refused_with_the_nearest(key, said):
    config = {"a": {"b": {"c": 1}, "list": [{"n": 1}], "null": None}, "s": {"class_path": "A"}, "vars": {"width": 1}}
    with pytest.raises(UserError) as caught:
        draft(config).override(key, 1, "override")
    assert str(caught.value) == f"override: {said}"
