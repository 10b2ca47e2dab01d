"""GPT-2's configuration: the architecture, and nothing about how it is trained.

The field names are those of the official `config.json` (Radford et al. 2019): a GPT-2 checkpoint's
configuration is read as it lies on the Hub, and one written here means the same to GPT-2 tools.

This file travels with every checkpoint, beside the model's, which it names in a line of its own:

    from .modeling_gpt2repro import GPT2ReproForCausalLM

Even here, within a text, transformers finds that line. It tells the remote code of two directories
called `final` apart by what is in the files that it finds so: without the line it would take this
file alone, and load the second model with the code of the first.
"""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN

# The four models of the paper: layers and width (table 2), and as many heads as make each 64 wide.
SIZES = {
    "gpt2": {"n_layer": 12, "n_embd": 768, "n_head": 12},  # 124,439,808 parameters
    "gpt2-medium": {"n_layer": 24, "n_embd": 1024, "n_head": 16},  # 354,823,168
    "gpt2-large": {"n_layer": 36, "n_embd": 1280, "n_head": 20},  # 774,030,080
    "gpt2-xl": {"n_layer": 48, "n_embd": 1600, "n_head": 25},  # 1,557,611,200
}

# Which class of modeling_gpt2repro.py answers to which Auto class, for `trust_remote_code=True`.
AUTO_MAP = {
    "AutoConfig": "configuration_gpt2repro.GPT2ReproConfig",
    "AutoModel": "modeling_gpt2repro.GPT2ReproModel",
    "AutoModelForCausalLM": "modeling_gpt2repro.GPT2ReproForCausalLM",
    "AutoModelForSequenceClassification": "modeling_gpt2repro.GPT2ReproForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_gpt2repro.GPT2ReproForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_gpt2repro.GPT2ReproForQuestionAnswering",
}

POSITIVE = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "layer_norm_epsilon")
# What is larger comes from a damaged file: no machine could begin to build it.
LARGEST = {"n_layer": 1000, "n_head": 1000, "n_embd": 10**5, "n_inner": 10**6}
LARGEST |= {"vocab_size": 2 * 10**6, "n_positions": 10**6}
PROBABILITIES = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


@strict
class GPT2ReproConfig(PreTrainedConfig):
    """A GPT-2; the defaults are the smallest of the four, 124M.

    Args:
        vocab_size: Byte-level BPE tokens. The checkpoint holds exactly these rows.
        n_positions: The longest context; positions are learned, so there is nothing beyond.
        n_embd: The width C of the residual stream, a multiple of `n_head`.
        n_layer: Blocks.
        n_head: Attention heads; each is C / n_head wide.
        n_inner: The width of the MLP; None is 4 C.
        activation_function: A name from `transformers.activations.ACT2FN`. GPT-2's is `gelu_new`,
            the tanh approximation.
        resid_pdrop: Dropout on what each sub-layer adds to the residual stream. The three default
            to 0, as pretraining wants it; official files say 0.1 and are taken at their word.
        embd_pdrop: Dropout on the sum of the embeddings.
        attn_pdrop: Dropout on the attention weights.
        layer_norm_epsilon: Added to the variance under the root.
        initializer_range: Standard deviation of the initial weights.
        scale_attn_weights: Divide attention scores by the root of the head's width.
        scale_attn_by_inverse_layer_idx: Divide them by (layer + 1) too (Mistral-GPT2's stability).
        reorder_and_upcast_attn: Scores and softmax in float32 (`eager` attention only).
        use_cache: Return keys and values for the next step.
        bos_token_id, eos_token_id: `<|endoftext|>` is both.
        pad_token_id: GPT-2 has none.
        tie_word_embeddings: The output projection is the token embedding (Press & Wolf 2017).

    Raises:
        StrictDataclassClassValidationError: naming the field, if a size is not positive or
            beyond `LARGEST`, `n_embd` is not a multiple of `n_head`, a probability is not in [0, 1]
            or the activation is unknown. It wraps the `ValueError`s below, now and again before
            saving.
        StrictDataclassFieldValidationError: naming the field, if a value has the wrong type.
    """

    model_type = "gpt2repro"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # before and since transformers 5.24
    attribute_map = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
    # FSDP2 frees a block's weights after use. There is no tensor-parallel plan: transformers shards
    # `nn.Linear` alone, and the official layout is `Conv1D`'s.
    base_model_fsdp_plan = {
        "wte": "free_full_weight",
        "h.*": "free_full_weight",
        "ln_f": "keep_full_weight",
    }

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float | int = 0.0
    embd_pdrop: float | int = 0.0
    attn_pdrop: float | int = 0.0
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        # Whatever class is saved, its directory answers to every Auto class; and a map that points
        # into the repository the model came from must not follow it into the next one.
        kwargs["auto_map"] = dict(AUTO_MAP)
        super().__post_init__(**kwargs)

    @classmethod
    def from_size(cls, size: str, **overrides) -> "GPT2ReproConfig":
        """One of the paper's models by its Hub name, e.g. `from_size("gpt2-xl", n_layer=2)`."""
        if size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}, not {size!r}")
        return cls(**{**SIZES[size], **overrides})

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """Read a `config.json`; an official one (`model_type: gpt2`) is one of ours."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict.get("model_type") == "gpt2":
            if config_dict.pop("add_cross_attention", False):
                raise ValueError("add_cross_attention: this GPT-2 is a decoder and has none")
            config_dict["model_type"] = cls.model_type
        return config_dict, kwargs

    def validate_architecture(self):
        """Called by `@strict` after construction and before saving."""
        for name in POSITIVE:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if self.n_inner is not None and self.n_inner <= 0:
            raise ValueError(f"n_inner must be positive (None is 4 * n_embd), not {self.n_inner}")
        for name, most in LARGEST.items():
            if (getattr(self, name) or 0) > most:
                raise ValueError(f"{name} must be at most {most}, not {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd must be a multiple of n_head, but {self.n_embd} % {self.n_head} is not 0"
            )
        for name in PROBABILITIES:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], not {getattr(self, name)}")
        if self.activation_function not in ACT2FN:
            raise ValueError(
                f"activation_function must be one of {', '.join(sorted(ACT2FN))}, "
                f"not {self.activation_function!r}"
            )


if __name__ == "configuration_gpt2repro":  # installed; every checkpoint brings code of its own
    AutoConfig.register(GPT2ReproConfig.model_type, GPT2ReproConfig, exist_ok=True)
GPT2ReproConfig.register_for_auto_class()
