"""The same numbers as transformers' torch models: of every family and setting, of every point, and of their files.

Gradients in float32 are measured against torch in float64, since torch's own float32 is off by as much as ours.
"""

import contextlib
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import mesh as meshes
from sae_jax.lm import Hook, generate, load, names_elsewhere, place, points, run
from sae_jax.lm.model import BUNDLED
from tests.golden.make_families import N_NEW, peer
from tests.lm.variants import CONFIGS, ids_of

pytestmark = pytest.mark.peers
torch = pytest.importorskip("torch")

NAMES = [*CONFIGS, "bundled"]
# Its module has the norm's input; the stream that goes on is another reader of the same values.
NO_MODULE_REPLACES = ("resid_mid",)


@pytest.fixture(scope="module", params=NAMES)
def both(request, tmp_path_factory):
    """(our model, transformers' in float32, ids)."""
    from transformers import AutoModelForCausalLM

    if request.param == "bundled":
        folder, ids = BUNDLED, np.random.default_rng(0).integers(0, 2048, (2, 24))
    else:
        folder = tmp_path_factory.mktemp("peer")
        peer(CONFIGS[request.param], folder)
        ids = ids_of(CONFIGS[request.param])
    settings = {"dtype": torch.float32, "attn_implementation": "eager"}
    return load(str(folder)), AutoModelForCausalLM.from_pretrained(folder, **settings).eval(), torch.tensor(ids)


class Float64(torch.overrides.TorchFunctionMode):
    """What is asked for in float32 is made in float64: these models cast norms, softmax and angles to float32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = torch.Tensor.double if func is torch.Tensor.float else func
        wide = [torch.float64 if value is torch.float32 else value for value in args]
        named = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return func(*wide, **named)


@pytest.fixture(scope="module")
def exact(both):
    """transformers' model in float64."""
    from transformers import AutoModelForCausalLM

    _, theirs, _ = both
    with Float64():
        model = AutoModelForCausalLM.from_config(theirs.config, attn_implementation="eager")
    model = model.double().eval()
    model.load_state_dict(theirs.state_dict())
    return model


def error_of_norm(found, true):
    found, true = np.asarray(found, np.float64), np.asarray(true, np.float64)
    return float(np.linalg.norm(found - true) / np.linalg.norm(true))


def relative_error(found, true):
    true = np.asarray(true, np.float64)
    return float(np.abs(np.asarray(found, np.float64) - true).max() / np.abs(true).max())


@contextlib.contextmanager
def at_module(theirs, name, change):
    """`change` of a module's output, or of its input if the name says so, while the block runs."""
    path, _, is_input = name.partition(" ")
    module = theirs.get_submodule(path)
    if is_input:
        handle = module.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
    else:

        def hook(_, __, out):
            return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

        handle = module.register_forward_hook(hook)
    yield
    handle.remove()


def hooks_of(model):
    layers = sorted({0, model.spec.n_layers - 1})
    return [Hook(layer, point) for layer in layers for point in points(model.spec)]


def module_of(model, hook):
    return names_elsewhere(model.spec, hook.point)[1].format(layer=hook.layer)


def test_logits_and_every_activation_are_equal(both):
    model, theirs, ids = both
    hooks, captured = hooks_of(model), {}
    with contextlib.ExitStack() as stack, torch.no_grad():
        for hook in hooks:
            take = lambda value, hook=hook: captured.setdefault(hook, value)  # noqa: E731
            stack.enter_context(at_module(theirs, module_of(model, hook), take))
        logits = theirs(ids, use_cache=False).logits
    out = jax.jit(lambda model, ids_BT: run(model, ids_BT, capture=hooks))(model, jnp.asarray(ids, jnp.int32))
    assert relative_error(out.logits, logits) < 5e-6
    for hook in hooks:
        found = out.acts[hook].reshape(*ids.shape, -1)
        assert relative_error(found, captured[hook].detach()) < 5e-6, hook


def test_replaced_activations_and_gradients_are_equal(both, exact):
    """At every point of the middle layer: another value there, and the gradient of a weighted sum of logits."""
    model, theirs, ids = both
    middle, rng = model.spec.n_layers // 2, np.random.default_rng(1)
    weights = rng.standard_normal((*ids.shape, model.spec.n_vocab)).astype(np.float32)
    ids_BT = jnp.asarray(ids, jnp.int32)
    for point in points(model.spec):
        hook = Hook(middle, point)
        if point in NO_MODULE_REPLACES:
            continue

        def torchs(module, value=None, hook=hook):
            """(the value that was put there, the logits)."""

            def change(old):
                nonlocal value
                if value is None:
                    value = (0.5 * old + 0.1 * torch.flip(old, [0])).detach()
                return value.requires_grad_()

            with at_module(module, module_of(model, hook), change):
                logits = module(ids, use_cache=False).logits
            (logits * torch.tensor(weights)).sum().backward()
            return value, logits

        value, logits = torchs(theirs)
        with Float64():
            true, true_logits = torchs(exact, value.detach().double())
        assert true.grad.dtype == true_logits.dtype == torch.float64

        def loss(v, hook=hook):
            edits = {hook: lambda old: v.reshape(old.shape)}
            logits = run(model, ids_BT, edits=edits).logits
            return (logits * weights).sum(), logits

        (_, found), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.asarray(value.detach().numpy()))
        assert relative_error(found, logits.detach()) < 5e-6, hook
        assert error_of_norm(gradient, true.grad) < 5e-6, hook
        assert error_of_norm(found, true_logits.detach()) < 5e-6, hook


def test_greedy_text_is_equal(both):
    model, theirs, ids = both
    ends = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    text = theirs.generate(ids, attention_mask=torch.ones(ids.shape), max_new_tokens=N_NEW, **ends)
    found = generate(model, jnp.asarray(ids, jnp.int32), N_NEW, jax.random.key(0))
    np.testing.assert_array_equal(found, text.numpy())


def test_bf16_is_as_near_as_torch_is(both):
    """To float32, as a root mean square: the errors of single logits depend on luck."""
    model, theirs, ids = both
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), model)
    ours = jax.jit(lambda model, ids_BT: run(model, ids_BT).logits)(half, jnp.asarray(ids, jnp.int32))
    with torch.no_grad():
        true = theirs(ids, use_cache=False).logits.numpy()
        # A copy: the fixture's model stays in float32.
        import copy

        rough = copy.deepcopy(theirs).to(torch.bfloat16)(ids, use_cache=False).logits.float().numpy()
    error = [float(np.sqrt(np.square(np.asarray(found, np.float32) - true).mean())) for found in (ours, rough)]
    assert error[0] < 1.1 * error[1], error


def test_split_parameters_give_the_same(both):
    """On 2 x 4 devices, matrices split over four of them: whatever axis does not divide stays whole."""
    model, theirs, ids = both
    devices = jax.devices("cpu")
    if len(devices) < 8:
        pytest.skip("needs eight devices")
    mesh = meshes.lm_mesh(4, devices[:8])
    ids_BT = jax.device_put(jnp.asarray(ids, jnp.int32), meshes.sharding(mesh, meshes.lm_rows(mesh)))
    with torch.no_grad():
        logits = theirs(ids, use_cache=False).logits
    found = jax.jit(lambda model, ids_BT: run(model, ids_BT).logits)(place(model, mesh), ids_BT)
    assert relative_error(found, logits) < 5e-6
    loaded = load(model.path, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)


def test_torchs_own_file_is_read(both, tmp_path):
    model, theirs, _ = both
    state = {name: value.contiguous() for name, value in theirs.state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    config = json.loads((BUNDLED / "config.json").read_text()) if model.path == str(BUNDLED) else None
    (tmp_path / "config.json").write_text(
        json.dumps(config) if config else theirs.config.to_json_string(use_diff=False)
    )
    loaded = load(str(tmp_path))
    assert dataclasses.replace(loaded.spec, norm_eps=model.spec.norm_eps) == model.spec
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)
