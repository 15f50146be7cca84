import pytest

from sae_jax.lm import Hook, hook_width, parse_hook, points
from sae_jax.types import UsageError
from tests.lm.tiny import SPEC


def test_text_and_hook_are_the_same_thing():
    for point in points(SPEC):
        hook = Hook(3, point)
        assert parse_hook(str(hook), SPEC) == hook == (3, point)


@pytest.mark.parametrize("text", ["", "resid_post", "resid_post.", "resid_post.-1", "resid_post.4", "mlp.0"])
def test_a_hook_that_does_not_exist_is_refused_with_what_does(text):
    with pytest.raises(UsageError) as caught:
        parse_hook(text, SPEC)
    assert repr(text) in str(caught.value)
    assert "resid_post" in str(caught.value)
    assert "layers 0 to 3" in str(caught.value)


def test_width_is_that_of_the_flattened_site():
    widths = {point: hook_width(SPEC, Hook(0, point)) for point in points(SPEC)}
    assert widths == dict.fromkeys(points(SPEC), 16) | {"mlp_act": 40}
