"""A decoder of Penzai, its layers one by one and in a stack."""

import jax
import pytest
from trees import enable_x64
from zoo import TOKENS, VOCABULARY, WIDTH, check, cross_entropy, lenient

pz = pytest.importorskip("penzai.pz", reason="Penzai is in the extra zoo")
llamalike = pytest.importorskip("penzai.models.transformer.variants.llamalike_common")


@pytest.mark.parametrize("stack", [False, True])
def test_llama(stack):
    config = llamalike.LlamalikeTransformerConfig(
        num_kv_heads=2,
        query_head_multiplier=2,
        embedding_dim=WIDTH,
        projection_dim=8,
        mlp_hidden_dim=4 * WIDTH,
        num_decoder_blocks=2,
        vocab_size=VOCABULARY,
        mlp_variant="swiglu",
        tie_embedder_and_logits=True,
        parameter_dtype="float64",
        activation_dtype="float64",
        use_layer_stack=stack,
    )

    def loss(params, tokens):
        bound = pz.bind_variables(model, list(params.values()))
        logits = bound(pz.nx.wrap(tokens[:-1], "seq")).unwrap("seq", "vocabulary")
        return cross_entropy(logits, tokens[1:])

    with lenient(), enable_x64(True):
        model = llamalike.build_llamalike_transformer(config, jax.random.key(0))
        model, params = pz.unbind_params(model, freeze=True)
        params = {p.label: p for p in params}
    with lenient():
        check(loss, params, TOKENS)
