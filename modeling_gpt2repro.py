"""GPT-2: "Language Models are Unsupervised Multitask Learners" (Radford et al. 2019), to be read.

The model is a stack of L identical blocks around one residual stream of width C. A token's row of the
stream starts as its embedding plus its position's embedding; every block adds to it twice, first
what attention gathers from earlier tokens, then what an MLP makes of it; after a last LayerNorm the
row is compared with every token's embedding, and the similarities are the logits of the next token.

    token ids (B, T) -> wte + wpe (B, T, C) -> L x [+ attn(ln_1), + mlp(ln_2)] -> ln_f -> logits (B, T, V)

Shapes: B rows of a batch, T tokens of a row, S >= T keys (cached ones and these), C = n_embd,
H heads of D = C / H, V = vocab_size. For the 124M model C, H, D, L, V = 768, 12, 64, 12, 50257.

Parameters have the official names and layouts, so official checkpoints load as they are and what is
saved here loads in every GPT-2 tool. This file travels with every checkpoint, beside
`configuration_gpt2repro.py`, and imports torch and transformers only.
"""

import math

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

try:  # as remote code in a checkpoint directory, and as an installed module
    from .configuration_gpt2repro import GPT2ReproConfig
except ImportError:
    from configuration_gpt2repro import GPT2ReproConfig


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """softmax(Q K^T * scaling + mask) V, written out (Vaswani et al. 2017, equation 1).

    query (B, H, T, D), key and value (B, H, S, D), additive mask (B, 1, T, S) or None; returns the
    mixed values (B, T, H, D) and the weights (B, H, T, S). The other implementations never hold the
    weights in memory; this one is for looking at them.
    """
    if module.upcast:
        query, key = query.float(), key.float()
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1).to(value.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


class GPT2ReproAttention(nn.Module):
    """Causal multi-head self-attention: each token looks back and takes what it needs.

    A token asks a question (query), every earlier token offers an answer (value) under a label
    (key), and the answers are averaged by how well their labels match the question: H times side by
    side, in subspaces of width D.
    """

    def __init__(self, config: GPT2ReproConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.n_embd // config.n_head
        self.is_causal = True
        self.attn_pdrop = config.attn_pdrop
        self.upcast = config.reorder_and_upcast_attn
        # Dot products of D unit-variance terms have variance D; the softmax wants about 1.
        self.scaling = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scaling /= layer_idx + 1

        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)  # weight (C, 3C): q, k, v in one
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch_shape = hidden_states.shape[:-1]  # (B, T)
        query, key, value = (
            part.view(*batch_shape, -1, self.head_dim).transpose(1, 2)  # (B, H, T, D), no copy
            for part in self.c_attn(hidden_states).split(self.config.n_embd, dim=-1)
        )
        if past_key_values is not None:  # append to the cache, attend to all of it: (B, H, S, D)
            key, value = past_key_values.update(key, value, self.layer_idx)

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        mixed, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attn_pdrop if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        mixed = mixed.reshape(*batch_shape, -1).contiguous()  # (B, T, H, D) -> (B, T, C)
        return self.resid_dropout(self.c_proj(mixed)), weights


class GPT2ReproMLP(nn.Module):
    """Two layers with a GELU between them (Hendrycks & Gimpel 2016), for each token on its own."""

    def __init__(self, config: GPT2ReproConfig):
        super().__init__()
        n_inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Conv1D(n_inner, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, n_inner)
        # OpenAI's GELU is the tanh approximation. transformers spells it out in seven operations;
        # torch has the same function in one kernel (equal up to the rounding of those steps).
        name = config.activation_function
        self.act = ACT2FN["gelu_pytorch_tanh" if name == "gelu_new" else name]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(hidden_states))))


class GPT2ReproBlock(GradientCheckpointingLayer):
    """One block: look back, then think, each on a normalized copy and added to the stream.

    GPT-2 moved LayerNorm "to the input of each sub-block" (section 2.3): the stream itself is
    never normalized, so the gradient reaches every layer through plain additions.
    """

    def __init__(self, config: GPT2ReproConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPT2ReproAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPT2ReproMLP(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        hidden_states = hidden_states + self.attn(self.ln_1(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.ln_2(hidden_states))


class GPT2ReproPreTrainedModel(PreTrainedModel):
    """What the classes below share: the initial weights, the loading, and what transformers asks."""

    config: GPT2ReproConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _input_embed_layer = "wte"
    _no_split_modules = ("GPT2ReproBlock",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {  # noqa: RUF012 (transformers' own convention)
        "hidden_states": GPT2ReproBlock,
        "attentions": GPT2ReproAttention,
    }
    # OpenAI's files store the causal mask of every layer; here the attention function knows it.
    _keys_to_ignore_on_load_unexpected = (r"attn\.bias", r"attn\.masked_bias")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """N(0, 0.02), zero biases, unit LayerNorms; and one exception.

        The stream is a sum of 2 L sub-layers, so the projections that write to it start smaller "by
        a factor of 1 / sqrt(N), where N is the number of residual layers" (section 2.3).
        """
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, Conv1D):
            init.normal_(module.weight, mean=0.0, std=std)
            init.zeros_(module.bias)
        if isinstance(module, GPT2ReproAttention | GPT2ReproMLP):
            residual_std = std / math.sqrt(2 * self.config.n_layer)
            init.normal_(module.c_proj.weight, mean=0.0, std=residual_std)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load a checkpoint; a tensor it lacks is an error, where transformers would make one up.

        A task head that is not in the file starts fresh, as everywhere in transformers. Whoever asks
        for `output_loading_info=True` gets the list of missing tensors instead of the error.

        Raises:
            ValueError: naming the tensors of the model that the checkpoint lacks.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        if wants_info:
            return model, info
        missing = sorted(
            k for k in info["missing_keys"] if not k.startswith(("score", "qa_outputs"))
        )
        if missing and pretrained_model_name_or_path is not None:
            shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise ValueError(
                f"{pretrained_model_name_or_path} is not a whole {cls.__name__}: "
                f"it lacks {len(missing)} of the model's tensors ({shown})"
            )
        return model


class GPT2ReproModel(GPT2ReproPreTrainedModel):
    """The decoder: token ids to hidden states (B, T, C), ready for a head."""

    def __init__(self, config: GPT2ReproConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(GPT2ReproBlock(config, i) for i in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        if position_ids is None:
            position_ids = self.positions(inputs_embeds, attention_mask, past_key_values)

        hidden_states = inputs_embeds + self.wpe(position_ids).to(inputs_embeds.device)
        if token_type_ids is not None:  # segments are told apart by a token's embedding
            hidden_states = hidden_states + self.wte(token_type_ids)
        hidden_states = self.drop(hidden_states)
        for block in self.h:
            hidden_states = block(
                hidden_states,
                attention_mask=causal_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(hidden_states),
            past_key_values=past_key_values if use_cache else None,
        )

    def positions(self, inputs_embeds, attention_mask, past_key_values) -> torch.LongTensor:
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        columns = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_length
        if attention_mask is None or attention_mask.ndim != 2:
            return columns[None]
        left_padding = (attention_mask.cumsum(dim=-1) == 0).sum(dim=-1, keepdim=True)
        return (columns - left_padding.to(columns.device)).clamp(min=0)


class GPT2ReproForCausalLM(GPT2ReproPreTrainedModel, GenerationMixin):
    """The language model: the decoder, and logits over the next token."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012

    def __init__(self, config: GPT2ReproConfig):
        super().__init__(config)
        self.transformer = GPT2ReproModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        shift_labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        if use_cache is None and self.training:
            use_cache = False
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            token_type_ids=token_type_ids,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, kept])

        loss = None
        if labels is not None or shift_labels is not None:
            loss = self.loss_function(
                logits, labels, self.config.vocab_size, shift_labels=shift_labels, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class GPT2ReproForSequenceClassification(
    GenericForSequenceClassification, GPT2ReproPreTrainedModel
):
    """One label for each row, read at its last token."""

    base_model_prefix = "transformer"


class GPT2ReproForTokenClassification(GenericForTokenClassification, GPT2ReproPreTrainedModel):
    """One label for each token."""

    base_model_prefix = "transformer"


class GPT2ReproForQuestionAnswering(GenericForQuestionAnswering, GPT2ReproPreTrainedModel):
    """The first and the last token of an answer in the text."""

    base_model_prefix = "transformer"
    get_input_embeddings = PreTrainedModel.get_input_embeddings
    set_input_embeddings = PreTrainedModel.set_input_embeddings


for auto_class, model_class in (
    (AutoModel, GPT2ReproModel),
    (AutoModelForCausalLM, GPT2ReproForCausalLM),
    (AutoModelForSequenceClassification, GPT2ReproForSequenceClassification),
    (AutoModelForTokenClassification, GPT2ReproForTokenClassification),
    (AutoModelForQuestionAnswering, GPT2ReproForQuestionAnswering),
):
    auto_class.register(GPT2ReproConfig, model_class, exist_ok=True)
    model_class.register_for_auto_class(auto_class.__name__)
