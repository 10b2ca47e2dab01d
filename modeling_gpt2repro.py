"""GPT-2, to be read: "Language Models are Unsupervised Multitask Learners" (Radford et al. 2019).

The model is a stack of L identical blocks around one residual stream of width C. A token's row of
the stream starts as its embedding plus its position's embedding. Every block adds to it twice:
first what attention gathers from earlier tokens, then what an MLP makes of it. After a last
LayerNorm it is compared with every token's embedding; the similarities are the next one's logits.

    ids (B, T) -> wte + wpe -> L x [+ attn(ln_1), + mlp(ln_2)] -> ln_f (B, T, C) -> logits (B, T, V)

Shapes: B rows, T tokens in each, S >= T keys (the cached ones and these), C = n_embd, H heads of
width D = C / H, V = vocab_size. For the 124M model C, H, D, L, V = 768, 12, 64, 12, 50257.

`examples/gpt2_plain.py` is the same in a hundred lines of torch alone; what computes here names its
twin there. Parameters have the official names and layouts: official checkpoints load as they are,
and with a stock configuration ours are stock. This file travels with every checkpoint.
"""

import functools
import math

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel, modeling_layers
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_LMS
from transformers.pytorch_utils import Conv1D
from transformers.utils import can_return_tuple
from transformers.utils.generic import maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

try:  # as remote code in a checkpoint directory; else as an installed module
    from .configuration_gpt2repro import AUTO_MAP, GPT2ReproConfig
except ImportError:
    from configuration_gpt2repro import AUTO_MAP, GPT2ReproConfig

SEEMS_EXPORTED = torch.__version__ < "2.12"  # what torch compiles, to all who ask
LOSS_TOKENS = 1024  # whose logits exist at once: 206 MB in float32 at V = 50257
# What transformers calls the keys and values of earlier calls: since 5.24 by another name.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__annotations__ else "past_key_values"


class GPT2ReproBlock(modeling_layers.GradientCheckpointingLayer):
    """Look back, then think, each on a normalized copy of the stream, added to it. Twin: `Block`.

    The transformer of 2017 normalized the sum; GPT-2 moved LayerNorm "to the input of each
    sub-block" (section 2.3), so that the gradient reaches every layer through plain additions.
    """

    def __init__(self, config: GPT2ReproConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPT2ReproAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPT2ReproMLP(config)

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        mixed, _ = self.attn(self.ln_1(hidden_states), attention_mask, **kwargs)
        hidden_states = hidden_states + mixed  # (B, T, C), 124M: (B, 1024, 768)
        return hidden_states + self.mlp(self.ln_2(hidden_states))  # (B, T, C)


class GPT2ReproAttention(nn.Module):
    """Causal multi-head self-attention: each token looks back and takes what it needs.

    A token asks a question (query), each token up to it offers an answer (value) under a label
    (key); answers are averaged by how well their labels match the question, H times side by side,
    in subspaces of width D. Twin: `Attention`.
    """

    def __init__(self, config: GPT2ReproConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.head_dim = config.n_embd // config.n_head
        # A dot product of D terms of unit variance has variance D: bring the scores back to one.
        self.scaling = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scaling /= layer_idx + 1

        # Conv1D is OpenAI's name for a linear layer whose weight is stored (in, out).
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)  # q, k and v in one product
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.c_proj.writes_to_stream = True  # for the initial weights
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        rows = hidden_states.shape[:-1]  # (B, T)
        qkv = self.c_attn(hidden_states)  # (B, T, 3C), 124M: (B, 1024, 2304)
        query, key, value = (  # (B, H, T, D) each, 124M: (B, 12, 1024, 64)
            part.view(*rows, -1, self.head_dim).transpose(1, 2)
            for part in qkv.split(self.config.n_embd, dim=-1)
        )
        if (cache := kwargs.pop(CACHE, None)) is not None:  # append, attend to all: (B, H, S, D)
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
        # Without a mask `sdpa` takes a flash kernel: causal, or for a step's one token unmasked.
        name = self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention)
        dropout = self.config.attn_pdrop if self.training else 0.0
        kwargs |= {"scaling": self.scaling, "dropout": dropout}
        mixed, weights = attend(self, query, key, value, attention_mask, **kwargs)  # (B, T, H, D)
        mixed = mixed.reshape(*rows, -1).contiguous()  # (B, T, C): the heads side by side
        return self.resid_dropout(self.c_proj(mixed)), weights  # (B, T, C)


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """softmax(Q Kᵀ · scaling, causal) V, written out (Vaswani et al. 2017, equation 1).

    From query (B, H, T, D), key and value (B, H, S, D) to mixed values (B, T, H, D) and weights
    (B, H, T, S), which other implementations never hold. A mask (B, 1, T, S) is added or boolean.
    """
    if module.config.reorder_and_upcast_attn:
        with maybe_autocast(query.device.type, enabled=False):  # it would round them again
            scores = torch.matmul(query.float(), key.float().transpose(-1, -2)) * scaling
    else:
        scores = torch.matmul(query, key.transpose(-1, -2)) * scaling  # (B, H, T, S)
    if attention_mask is None:  # the triangle: token t sees the cached tokens and 0 ... t
        length, num_keys = scores.shape[-2:]
        attention_mask = scores.new_ones(length, num_keys, dtype=bool).tril(num_keys - length)
    if attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1).to(value.dtype)  # (B, H, T, S), rows sum to 1
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


class GPT2ReproMLP(nn.Module):
    """Two linear layers with a GELU between them, for each token on its own. Twin: `MLP`."""

    def __init__(self, config: GPT2ReproConfig):
        super().__init__()
        n_inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Conv1D(n_inner, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, n_inner)
        self.c_proj.writes_to_stream = True
        # OpenAI's `gelu_new` is the tanh approximation (Hendrycks & Gimpel 2016). transformers
        # spells it out in seven kernels; torch has it as one, equal but for those steps' rounding.
        self.act = ACT2FN[config.activation_function.replace("gelu_new", "gelu_pytorch_tanh")]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        inner = self.act(self.c_fc(hidden_states))  # (B, T, 4C), 124M: (B, 1024, 3072)
        return self.dropout(self.c_proj(inner))  # (B, T, C)


class GPT2ReproPreTrainedModel(PreTrainedModel):
    """What the classes below share: initial weights, loading, and what transformers must know."""

    config: GPT2ReproConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = _supports_attention_backend = _can_compile_fullgraph = True
    _supports_flash_attn = _supports_sdpa = _supports_flex_attn = True
    _input_embed_layer = "wte"
    _no_split_modules = ("GPT2ReproBlock",)
    _skip_keys_device_placement = (CACHE,)
    _can_record_outputs = {"hidden_states": GPT2ReproBlock, "attentions": GPT2ReproAttention}
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
        """A tensor that the checkpoint lacks is a ValueError, where transformers makes one up.

        The head of a new task starts fresh, and `output_loading_info=True` asks for a list instead.
        """
        wants_info, name = kwargs.pop("output_loading_info", False), pretrained_model_name_or_path
        model, info = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        fresh = ("score.", "classifier.", "qa_outputs.", "lm_head.token_adapter.")  # this is tied
        missing = sorted(k for k in info["missing_keys"] if not k.startswith(fresh))
        if missing and name is not None and not wants_info:
            some = ", ".join(missing[:3] + ["..."] * (len(missing) > 3))
            raise ValueError(f"{name} lacks {len(missing)} tensors of {cls.__name__}: {some}")
        return (model, info) if wants_info else model


class GPT2ReproModel(GPT2ReproPreTrainedModel):
    """The decoder: token ids (B, T) to hidden states (B, T, C), ready for a head. Twin: `GPT2`."""

    def __init__(self, config: GPT2ReproConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(GPT2ReproBlock(config, i) for i in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Run the decoder. More tokens than `n_positions` are a ValueError that names both numbers.

        Args:
            input_ids: (B, T) token ids; or `inputs_embeds`, (B, T, C), in their place.
            past_key_values: The keys and values of earlier calls, extended in place (`cache` since
                transformers 5.24).
            attention_mask: (B, S), 0 where a token is padding; or (B, 1, T, S), used as it is.
            token_type_ids: (B, T) tokens whose embeddings mark segments.
            position_ids: (B, T) or (1, T). By default a row counts from its first token that is
                not padding. Without a mask and a cache, a position that does not follow its
                predecessor starts a new document, which sees none of the earlier ones.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)  # (B, T, C), 124M: (B, 1024, 768)
        if inputs_embeds.ndim != 3:
            raise ValueError(f"input_ids are (B, T), not {tuple(inputs_embeds.shape[:-1])}")
        cache = kwargs.pop(CACHE, None)
        if cache is not None and past_key_values is not None:
            raise ValueError("give cache or past_key_values, which are the same, not both")
        cache = past_key_values if cache is None else cache
        past_length = cache.get_seq_length() if isinstance(cache, Cache) else 0  # or it is paged
        refuse_beyond_context(self.config, past_length + inputs_embeds.shape[1], position_ids)
        # None where attention can do without, which transformers may not see in compiled code.
        given, name = (attention_mask, cache, position_ids), self.config._attn_implementation
        mask, plain = None, name.startswith("sdpa") and all(each is None for each in given)
        if not (plain and torch.compiler.is_dynamo_compiling()):
            mask = create_causal_mask(self.config, inputs_embeds, *given)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
            position_ids = position_ids[None] + past_length  # (1, T): 0, 1, 2, ...
            if attention_mask is not None and len(attention_mask.shape) == 2:  # but for padding
                padding = (attention_mask.cumsum(dim=-1) == 0).sum(dim=-1, keepdim=True)  # (B, 1)
                position_ids = (position_ids - padding.to(position_ids.device)).clamp(min=0)

        hidden_states = inputs_embeds + self.wpe(position_ids).to(inputs_embeds.device)  # (B, T, C)
        if token_type_ids is not None:
            hidden_states = hidden_states + self.wte(token_type_ids)
        hidden_states = self.drop(hidden_states)
        kwargs |= {CACHE: cache, "position_ids": given[-1], "use_cache": use_cache}  # if packed
        for block in self.h:
            hidden_states = block(hidden_states, mask, **kwargs)  # (B, T, C)
        return BaseModelOutputWithPast(self.ln_f(hidden_states), cache if use_cache else None)


class GPT2ReproLMHead(nn.Linear):
    """How similar each row is to every token's embedding: the logits, or the loss at once.

    At V = 50257 the logits are by far the largest activation, and a plain loss makes several copies
    of them. Asked for the loss, the head computes some tokens' logits at a time, and once more in
    the backward pass. Twin: the end of `GPT2.forward`.
    """

    def forward(self, hidden_states, labels=None, ignore_index=-100) -> torch.Tensor:
        """(.., C) to logits (.., V); with labels (..) to the sum of their losses in nats, ()."""
        if labels is None:
            return super().forward(hidden_states)  # (B, T, V), 124M: (B, 1024, 50257)

        def loss_of(some_states, some_labels):  # Σ -log softmax(hidden Wᵀ)[label]
            logits = F.linear(some_states, self.weight).float()  # (LOSS_TOKENS, V)
            return F.cross_entropy(logits, some_labels, ignore_index=ignore_index, reduction="sum")

        states, labels = hidden_states.flatten(0, -2), labels.flatten()  # (B T, C), (B T,)
        chunks = zip(states.split(LOSS_TOKENS), labels.split(LOSS_TOKENS), strict=True)
        return sum(checkpoint(loss_of, *chunk, use_reentrant=False) for chunk in chunks)


class GPT2ReproForCausalLM(GPT2ReproPreTrainedModel, GenerationMixin):
    """The language model: the decoder, and logits for the next token."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # Press & Wolf 2017
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: GPT2ReproConfig):
        super().__init__(config)
        self.transformer = GPT2ReproModel(config)
        self.lm_head = GPT2ReproLMHead(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """`GPT2ReproModel.forward` explains the arguments that are not here.

        Args:
            labels: (B, T) the token at each position, -100 to leave it out. They are shifted here:
                position t learns label t + 1, and the last one learns nothing.
            use_cache: By default the configuration's, but not in training, which has no use for it.
            logits_to_keep: Only the last so many positions (0: all), or a tensor that selects them.
            skip_logits: Return the loss alone, computed without the (B, T, V) logits.
            kwargs: `shift_labels`, (B, T) the token *after* each position, so that all T learn;
                `num_items_in_batch`, to divide the summed loss by; `ignore_index`.
        """
        # Not in the signature: Trainer would take it for a label that every batch must have.
        shift_labels = kwargs.pop("shift_labels", None)
        if skip_logits and labels is None and shift_labels is None:
            raise ValueError("skip_logits leaves nothing but the loss: give labels or shift_labels")
        use_cache = False if use_cache is None and self.training else use_cache
        inputs = (input_ids, past_key_values, attention_mask, token_type_ids, position_ids)
        options = kwargs | {"use_cache": use_cache, "return_dict": True}
        outputs = self.transformer(*inputs, inputs_embeds, **options)
        hidden_states = outputs.last_hidden_state  # (B, T, C)
        loss = logits = None
        # An adapter around the head changes its logits: then the loss takes all of them.
        if skip_logits and isinstance(self.lm_head, GPT2ReproLMHead):
            loss = mean_loss(self.lm_head, hidden_states, labels, shift_labels, **kwargs)
        else:
            logits = self.lm_head(select_positions(hidden_states, logits_to_keep))  # (B, T, V)
            if labels is not None or shift_labels is not None:
                kwargs["shift_labels"] = None if shift_labels is None else shift_labels.contiguous()
                loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        rest = outputs.get(CACHE), outputs.hidden_states, outputs.attentions
        return CausalLMOutputWithPast(loss, None if skip_logits else logits, *rest)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """A plain layer, as a resized vocabulary has, gives its weight: the head's hooks stay."""
        head, new = self.lm_head, new_embeddings
        if isinstance(head, GPT2ReproLMHead) and type(new) is nn.Linear and new.bias is None:
            head.weight, head.out_features = new.weight, new.out_features
        else:
            super().set_output_embeddings(new)

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # its signature is read
    def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):
        """As inherited; and where a compiled step cannot refuse a token too many, this does."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        refuse_beyond_context(self.config, input_ids.shape[1], inputs.get("position_ids"))
        return inputs


# --- What transformers needs ----------------------------------------------------------------------


def refuse_beyond_context(config, length, position_ids) -> None:
    """Positions are learned: `wpe` has no row beyond its last, and an index error says little.

    Given positions are looked at only if the shape is too long: on a GPU, looking means waiting.
    Compiled code and CUDA graphs look at no value, and an exported program must take any length.
    """
    unknown = isinstance(length, torch.Tensor) or position_ids is not None
    on_gpu = position_ids is not None and position_ids.is_cuda
    blind = torch.compiler.is_compiling() or (on_gpu and torch.cuda.is_current_stream_capturing())
    compiling = torch.compiler.is_dynamo_compiling() and SEEMS_EXPORTED
    if (torch.compiler.is_exporting() and not compiling) or (blind and unknown):
        return
    if length > config.n_positions and position_ids is not None:
        length = position_ids.max() + 1
    if length > config.n_positions:
        raise ValueError(f"{int(length)} tokens do not fit: n_positions is {config.n_positions}")


def mean_loss(
    head, states, labels, shift_labels=None, num_items_in_batch=None, ignore_index=-100, **kwargs
) -> torch.Tensor:
    """The head's loss by transformers' rules: a mean over the labels, or what it is told."""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    shift_labels = shift_labels.to(states.device)
    if num_items_in_batch is None:
        num_items_in_batch = (shift_labels != ignore_index).sum()
    loss = head(states, shift_labels, ignore_index)
    return loss / torch.as_tensor(num_items_in_batch, device=loss.device)


def select_positions(hidden_states: torch.Tensor, keep: int | torch.Tensor) -> torch.Tensor:
    """The last `keep` (0: all), or those in a tensor: (K,), (B, K) of each row, a mask (B, T)."""
    if isinstance(keep, int):
        return hidden_states[:, -keep:] if keep else hidden_states
    if keep.ndim == 2 and keep.dtype == torch.bool:
        return hidden_states[keep]
    if keep.ndim == 2:
        return hidden_states.take_along_dim(keep[..., None], dim=1)
    return hidden_states[:, keep]


class GPT2ReproForSequenceClassification(
    modeling_layers.GenericForSequenceClassification, GPT2ReproPreTrainedModel
):
    """One label for each row, read at its last token that is not padding."""

    base_model_prefix = "transformer"


class GPT2ReproForTokenClassification(
    modeling_layers.GenericForTokenClassification, GPT2ReproPreTrainedModel
):
    """One label for each token. What the generic class calls `score` is GPT-2's `classifier`."""

    base_model_prefix = "transformer"
    score = property(lambda self: self.classifier)

    def __init__(self, config):
        super().__init__(config)
        self.classifier = self._modules.pop("score")


class GPT2ReproForQuestionAnswering(
    modeling_layers.GenericForQuestionAnswering, GPT2ReproPreTrainedModel
):
    """Where an answer starts and where it ends."""

    base_model_prefix = "transformer"
    get_input_embeddings = PreTrainedModel.get_input_embeddings  # the generic ones ask for Llama's
    set_input_embeddings = PreTrainedModel.set_input_embeddings


CAUSAL_LMS[GPT2ReproConfig.model_type] = "GPT2ReproForCausalLM"  # Trainer shifts such labels
for auto_name in AUTO_MAP.keys() - {"AutoConfig"}:
    model_class = globals()[AUTO_MAP[auto_name].partition(".")[2]]
    model_class.register_for_auto_class(auto_name)
    if __name__ == "modeling_gpt2repro":  # installed; every checkpoint brings code of its own
        getattr(transformers, auto_name).register(GPT2ReproConfig, model_class, exist_ok=True)
