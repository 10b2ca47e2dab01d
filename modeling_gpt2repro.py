"""GPT-2, to be read: "Language Models are Unsupervised Multitask Learners" (Radford et al. 2019).

The model is a stack of L identical blocks around one residual stream of width C. A token's row of
the stream starts as its embedding plus its position's embedding. Every block adds to it twice:
first what attention gathers from earlier tokens, then what an MLP makes of it. After a last
LayerNorm the row is compared with every token's embedding; the similarities are the logits of the
token that comes next.

    ids (B, T) -> wte + wpe -> L x [+ attn(ln_1), + mlp(ln_2)] -> ln_f (B, T, C) -> logits (B, T, V)

Shapes: B rows, T tokens in each, S >= T keys (the cached ones and these), C = n_embd, H heads of
width D = C / H, V = vocab_size. For the 124M model C, H, D, L, V = 768, 12, 64, 12, 50257.

Parameters have the official names and layouts: official checkpoints load as they are, and what is
saved here loads in every GPT-2 tool. This file travels with every checkpoint, beside
`configuration_gpt2repro.py`, and imports torch and transformers only.
"""

import functools
import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
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

try:  # as remote code in a checkpoint directory; else as an installed module
    from .configuration_gpt2repro import GPT2ReproConfig
except ImportError:
    from configuration_gpt2repro import GPT2ReproConfig

LOSS_TOKENS = 1024  # whose logits exist at once: 206 MB in float32
FEW_ROWS, LARGE_WEIGHT = 64, 2**22  # products on a CPU that wait for memory: (F, C) and (V, C)


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """softmax(Q Kᵀ · scaling + mask) V, written out (Vaswani et al. 2017, equation 1).

    From query (B, H, T, D), key and value (B, H, S, D) and an additive mask (B, 1, T, S) or None to
    the mixed values (B, T, H, D) and the weights (B, H, T, S). The other attention implementations
    compute the same and never hold the weights; this one is for looking at them.
    """
    if module.upcast:
        query, key = query.float(), key.float()
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1).to(value.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


class GPT2ReproAttention(nn.Module):
    """Causal multi-head self-attention: each token looks back and takes what it needs.

    A token asks a question (query), each token up to it offers an answer (value) under a label
    (key), and the answers are averaged by how well their labels match the question; H times side
    by side, in subspaces of width D.
    """

    def __init__(self, config: GPT2ReproConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True
        self.head_dim = config.n_embd // config.n_head
        self.attn_pdrop = config.attn_pdrop
        self.upcast = config.reorder_and_upcast_attn
        # A dot product of D terms of unit variance has variance D: bring the scores back to one.
        self.scaling = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scaling /= layer_idx + 1

        # Conv1D is OpenAI's name for a linear layer whose weight is stored (in, out).
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)  # q, k and v in one product
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.c_proj.writes_to_stream = True  # for the initial weights
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self,
        hidden_states: torch.Tensor,  # (B, T, C)
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        rows = hidden_states.shape[:-1]  # (B, T)
        query, key, value = (  # three views (B, H, T, D) of one (B, T, 3C)
            part.view(*rows, -1, self.head_dim).transpose(1, 2)
            for part in self.c_attn(hidden_states).split(self.config.n_embd, dim=-1)
        )
        if past_key_values is not None:  # append to the cache; attend to all of it, (B, H, S, D)
            key, value = past_key_values.update(key, value, self.layer_idx)

        # Without a mask, `sdpa` takes a flash kernel: causal for T > 1, unmasked for the one token
        # of a decoding step, which may see everything.
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
        mixed = mixed.reshape(*rows, -1).contiguous()  # (B, T, H, D) -> (B, T, C)
        return self.resid_dropout(self.c_proj(mixed)), weights


class GPT2ReproMLP(nn.Module):
    """Two linear layers with a GELU between them, for each token on its own."""

    def __init__(self, config: GPT2ReproConfig):
        super().__init__()
        n_inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Conv1D(n_inner, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, n_inner)
        self.c_proj.writes_to_stream = True
        # OpenAI's `gelu_new` is the tanh approximation (Hendrycks & Gimpel 2016). transformers
        # spells it out in seven kernels; torch has it as one, equal but for those steps' rounding.
        name = config.activation_function
        self.act = ACT2FN["gelu_pytorch_tanh" if name == "gelu_new" else name]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (B, T, C) -> (B, T, C)
        return self.dropout(self.c_proj(self.act(self.c_fc(hidden_states))))


class GPT2ReproBlock(GradientCheckpointingLayer):
    """Look back, then think: each on a normalized copy of the stream, and added to it.

    The transformer of 2017 normalized the sum; GPT-2 moved LayerNorm "to the input of each
    sub-block" (section 2.3), so that the gradient reaches every layer through plain additions.
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
    """What the classes below share: initial weights, loading, and what transformers must know."""

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
    # OpenAI's files hold every layer's causal mask; here the attention function knows it.
    _keys_to_ignore_on_load_unexpected = (r"attn\.bias", r"attn\.masked_bias")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """N(0, 0.02) for weights, zero for biases, LayerNorms as the identity; and one exception.

        The stream ends as a sum of 2 L sub-layers, so the projections that write to it start
        smaller, "by a factor of 1/√N where N is the number of residual layers" (section 2.3).
        """
        super()._init_weights(module)
        if isinstance(module, Conv1D):
            std = self.config.initializer_range
            if getattr(module, "writes_to_stream", False):
                std /= math.sqrt(2 * self.config.n_layer)
            init.normal_(module.weight, mean=0.0, std=std)
            init.zeros_(module.bias)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load a checkpoint; a tensor it lacks is an error, where transformers makes one up.

        The head of a new task starts fresh, as everywhere in transformers. Who asks for
        `output_loading_info=True` gets the list of missing tensors instead of the error.

        Raises:
            ValueError: naming the model's tensors that are not in the checkpoint.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        if wants_info:
            return model, info
        new_heads = ("score.", "qa_outputs.")
        missing = sorted(key for key in info["missing_keys"] if not key.startswith(new_heads))
        if missing and pretrained_model_name_or_path is not None:
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(missing)} tensors of {cls.__name__}: "
                + ", ".join(missing[:3] + ["..."] * (len(missing) > 3))
            )
        return model


class GPT2ReproModel(GPT2ReproPreTrainedModel):
    """The decoder: token ids (B, T) to hidden states (B, T, C), ready for a head."""

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
        """Run the decoder.

        Args:
            input_ids: (B, T) token ids; or `inputs_embeds`, (B, T, C), in their place.
            attention_mask: (B, S), 0 where a token is padding; or (B, 1, T, S), used as it is.
            position_ids: (B, T) or (1, T). By default a row counts from its first token that is
                not padding. Without a mask and a cache, a position that does not follow its
                predecessor starts a new document, which sees none of the earlier ones.
            past_key_values: The keys and values of earlier calls, extended in place.
            token_type_ids: (B, T) tokens whose embeddings mark segments.
            use_cache: Return a cache, new if none was given.

        Raises:
            ValueError: if a token would stand beyond `n_positions`, naming both lengths.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        self.refuse_beyond_context(past_length + inputs_embeds.shape[1], position_ids)
        causal_mask = create_causal_mask(  # None wherever the attention function can do without
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        if position_ids is None:
            position_ids = self.count_positions(inputs_embeds, attention_mask, past_length)

        hidden_states = inputs_embeds + self.wpe(position_ids).to(inputs_embeds.device)
        if token_type_ids is not None:
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

    @staticmethod
    def count_positions(inputs_embeds, attention_mask, past_length) -> torch.LongTensor:
        """0, 1, 2, ... for each row from its first token that is not padding: (B, T) or (1, T)."""
        columns = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_length
        if attention_mask is None or attention_mask.ndim != 2:
            return columns[None]
        padding = (attention_mask.cumsum(dim=-1) == 0).sum(dim=-1, keepdim=True)  # (B, 1)
        return (columns - padding.to(columns.device)).clamp(min=0)

    def refuse_beyond_context(self, length, position_ids) -> None:
        """Positions are learned: `wpe` has no row beyond its last, and an index error says little.

        Given positions are looked at only where the sequence is too long by its shape (packed or
        padded, it may still fit): on a GPU, looking means waiting. Compiled code looks at no value,
        and an exported program must take any length (torch 2.11 takes all compiled code for one).
        """
        unknown = isinstance(length, torch.Tensor) or position_ids is not None
        if torch.compiler.is_exporting() or (torch.compiler.is_compiling() and unknown):
            return
        limit = self.config.n_positions
        if length > limit and position_ids is not None:
            length = position_ids.max() + 1
        if length > limit:
            raise ValueError(
                f"a sequence of {int(length)} tokens does not fit: n_positions is {limit}"
            )


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignore_index: int
) -> torch.Tensor:
    """Σ -log softmax(hidden Wᵀ)[label] in nats, without the logits of all tokens.

    At V = 50257 the logits are by far the largest activation, and a plain loss makes several copies
    of them. Here they exist for some tokens at a time, and once more in the backward pass.
    From hidden (N, C), weight (V, C) and labels (N,) to a scalar.
    """

    def of_chunk(hidden, labels):
        logits = F.linear(hidden, weight).float()
        return F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")

    chunks = zip(hidden.split(LOSS_TOKENS), labels.split(LOSS_TOKENS), strict=True)
    return sum(checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks)


class GPT2ReproLMHead(nn.Linear):
    """The logits: how similar each row is to every token's embedding, (.., C) -> (.., V).

    In decoding, few rows meet a weight of V C numbers, and on a CPU the product takes as long as it
    takes to read them. `nn.Linear` reads them at half the memory's speed; what is here, at all of
    it. The sums are the same in another order: logits equal the usual ones up to rounding.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.waits_for_memory(hidden_states):
            return super().forward(hidden_states)
        num_rows = hidden_states.shape[:-1].numel()
        if num_rows == 1 and torch.compiler.is_dynamo_compiling():  # it makes one loop of these
            return (hidden_states[..., None, :] * self.weight).sum(dim=-1)
        if not self.weight.dtype == hidden_states.dtype == torch.float32:
            return super().forward(hidden_states)
        # The weight comes first; and a second row, as for one alone the library has one thread.
        rows = hidden_states.reshape(num_rows, self.in_features)
        logits = self.weight @ (rows.repeat(2, 1) if num_rows == 1 else rows).T
        return logits.T[:num_rows].reshape(*hidden_states.shape[:-1], -1).contiguous()

    def waits_for_memory(self, hidden_states: torch.Tensor) -> bool:
        """Whether few rows meet a large weight on a CPU; what is recorded must take any length."""
        if torch.compiler.is_exporting() or torch.jit.is_tracing() or not is_plain(self):
            return False
        on_cpu = hidden_states.device.type == "cpu" and self.weight.numel() >= LARGE_WEIGHT
        return on_cpu and 0 < hidden_states.shape[:-1].numel() <= FEW_ROWS


def is_plain(head: nn.Module) -> bool:
    """Whether it is a product with its weight: adapters, shards and quantizations do otherwise."""
    is_linear = type(head) in (nn.Linear, GPT2ReproLMHead) and head.bias is None
    return is_linear and type(head.weight) is nn.Parameter


class GPT2ReproForCausalLM(GPT2ReproPreTrainedModel, GenerationMixin):
    """The language model: the decoder, and logits for the next token."""

    # "Using the output embedding to improve language models" (Press & Wolf 2017): one matrix.
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012
    # The training loop puts a faster one in its place (gpt2repro/speed/fused_cross_entropy.py).
    linear_cross_entropy = staticmethod(linear_cross_entropy)

    def __init__(self, config: GPT2ReproConfig):
        super().__init__(config)
        self.transformer = GPT2ReproModel(config)
        self.lm_head = GPT2ReproLMHead(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Also called when the vocabulary is resized, with a plain layer of the new size."""
        if type(new_embeddings) is nn.Linear:
            new_embeddings.__class__ = GPT2ReproLMHead
        super().set_output_embeddings(new_embeddings)

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
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Run the model; `GPT2ReproModel.forward` explains the arguments that are not here.

        Args:
            labels: (B, T) the token at each position, -100 to leave it out. They are shifted here:
                position t learns label t + 1, and the last one learns nothing.
            use_cache: By default the configuration's, but not in training, which has no use for it.
            logits_to_keep: Only the last so many positions (0: all), or a tensor that selects them.
            skip_logits: Return the loss alone, computed without the (B, T, V) logits.
            shift_labels: (B, T) the token *after* each position, so that all T learn. With rows of
                T + 1 tokens, `model(rows[:, :-1], shift_labels=rows[:, 1:])`.
            num_items_in_batch: What the summed loss is divided by, instead of the labels it counts.
            ignore_index: Another label to leave out than -100.
            kwargs: Whatever the attention implementation takes.
        """
        # Not in the signature: Trainer would take it for a label that every batch must have.
        shift_labels = kwargs.pop("shift_labels", None)
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
        if shift_labels is not None:
            shift_labels = shift_labels.contiguous()  # rows[:, 1:] is a view
        supervised = labels is not None or shift_labels is not None
        if skip_logits and not supervised:
            raise ValueError("skip_logits leaves nothing but the loss: give labels or shift_labels")

        loss = logits = None
        if skip_logits and is_plain(self.lm_head):
            loss = self.loss_without_logits(hidden_states, labels, shift_labels, **kwargs)
        else:
            logits = self.lm_head(select_positions(hidden_states, logits_to_keep))
            if supervised:
                loss = self.loss_function(
                    logits, labels, self.config.vocab_size, shift_labels=shift_labels, **kwargs
                )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=None if skip_logits else logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def loss_without_logits(
        self,
        hidden_states: torch.Tensor,
        labels: torch.LongTensor | None,
        shift_labels: torch.LongTensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        ignore_index: int = -100,
        **kwargs,
    ) -> torch.Tensor:
        """The mean cross-entropy of `loss_function`, in nats; see `linear_cross_entropy`."""
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        shift_labels = shift_labels.reshape(-1).to(hidden_states.device)
        summed = self.linear_cross_entropy(
            hidden_states.flatten(0, -2), self.lm_head.weight, shift_labels, ignore_index
        )
        if num_items_in_batch is None:
            num_items_in_batch = (shift_labels != ignore_index).sum()
        if isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(summed.device)
        return summed / num_items_in_batch

    # Wrapped, because `generate` reads the signature to learn what it may pass.
    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):
        """As inherited; and where a compiled step cannot refuse a token too many, this does."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        self.transformer.refuse_beyond_context(input_ids.shape[1], inputs.get("position_ids"))
        return inputs


def select_positions(hidden_states: torch.Tensor, keep: int | torch.Tensor) -> torch.Tensor:
    """The last `keep` positions (0: all) or those a tensor names, as in transformers.

    A 1-D tensor of positions serves all rows; a 2-D one holds positions (B, K) of each row, or is
    a boolean mask (B, T), which flattens what it selects to (K, C).
    """
    if isinstance(keep, int):
        return hidden_states[:, -keep:] if keep else hidden_states
    if keep.ndim == 2 and keep.dtype == torch.bool:
        return hidden_states[keep]
    if keep.ndim == 2:
        return hidden_states.take_along_dim(keep[..., None], dim=1)
    return hidden_states[:, keep]


class GPT2ReproForSequenceClassification(
    GenericForSequenceClassification, GPT2ReproPreTrainedModel
):
    """One label for each row, read at its last token that is not padding."""

    base_model_prefix = "transformer"


class GPT2ReproForTokenClassification(GenericForTokenClassification, GPT2ReproPreTrainedModel):
    """One label for each token."""

    base_model_prefix = "transformer"


class GPT2ReproForQuestionAnswering(GenericForQuestionAnswering, GPT2ReproPreTrainedModel):
    """Where an answer starts and where it ends."""

    base_model_prefix = "transformer"
    get_input_embeddings = PreTrainedModel.get_input_embeddings  # the generic ones ask for Llama's
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
