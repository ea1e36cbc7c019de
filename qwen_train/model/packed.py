"""One model behind one question: `model(batch) -> TokenScores`; its greedy samples, its adapters, what is trained."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from qwen_train.data.packing import Batch
from qwen_train.model.adapters import REFERENCE_ADAPTER
from qwen_train.model.attention import ATTENTION, attention_kwargs, check_config
from qwen_train.model.compile import DecoderLayers
from qwen_train.model.last_layer import keep_supervised_rows
from qwen_train.model.logprobs import TokenScores, token_logprobs

SAMPLED_TOGETHER = 64
"""Prompts that are answered as one batch."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards in the mode that it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class PackedLM(nn.Module):
    """A causal language model that scores packed batches; the head runs in here, on supervised positions only.

    The head inside the forward lets FSDP2 gather it with the root module. There is a `tie_weights`, since accelerate
    ties again only if there is, and no `get_*_embeddings`, since accelerate would shard the head apart. `source` holds
    the values, on rank 0, of a model that is on the meta device until it is sharded.
    """

    def __init__(
        self,
        lm: PreTrainedModel | PeftModel,
        attention: str,
        head_chunk: int,
        end_token: int,
        pad_token: int,
        max_length: int,
        compiled: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        sharded: bool = False,
        source: Mapping[str, Tensor] | None = None,
        weighted_sum: bool = False,
    ) -> None:
        """`attention` is one of attention.py's backends; `dtype` what FSDP2 computes in, where the model is `sharded`.

        `weighted_sum`: every loss is a multiple of the batch's sum of `logps * weights`, as SFT's is; a trained head
        then needs no second product (logprobs.py). Raises ValueError for a config that packed attention gets wrong.
        """
        super().__init__()
        self.lm = lm
        check_config(self.causal_lm.config, attention)
        self.causal_lm.set_attn_implementation(ATTENTION)
        self.attention = attention
        self.head_chunk = head_chunk
        self.end_token = end_token
        self.pad_token = pad_token
        self.max_length = max_length
        self.dtype = dtype
        self.sharded = sharded
        self.source = source
        self.weighted_sum = weighted_sum
        keep_supervised_rows(self.causal_lm.model.layers[-1])  # what forward asks of it
        self.layers = DecoderLayers(list(self.causal_lm.model.layers), compiled, _draws_masks(self.causal_lm))

    @property
    def decoder_layer(self) -> str:
        """The name of the class that FSDP2 wraps."""
        return type(self.causal_lm.model.layers[0]).__name__

    @property
    def causal_lm(self) -> PreTrainedModel:
        lm = self.lm.get_base_model() if isinstance(self.lm, PeftModel) else self.lm
        assert isinstance(lm, PreTrainedModel)
        return lm

    def tie_weights(self) -> None:
        self.causal_lm.tie_weights()

    def forward(self, batch: Batch) -> TokenScores:
        """Log-probabilities (fp32) of the batch's targets."""
        lm = self.causal_lm
        # An empty micro-batch still runs the last layer, whose weights FSDP2 gathers, on one row that nobody reads.
        rows = batch.target_positions if len(batch.targets) else batch.position_ids.new_zeros(1)
        hidden = lm.model(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            use_cache=False,
            packed_rows=rows,
            **attention_kwargs(batch.bounded(self.max_length), self.attention),
        ).last_hidden_state[0]
        assert len(hidden) == len(rows), "the last layer returned other rows than it was asked for"
        hidden = hidden[: len(batch.targets)]
        compiled_head = self.layers.compiled and hidden.is_cuda
        weights = batch.weights if self.weighted_sum else None
        return token_logprobs(hidden, lm.lm_head.weight, batch.targets, self.head_chunk, compiled_head, weights)

    def _lora_layers(self) -> Iterator[LoraLayer]:
        return (module for module in self.lm.modules() if isinstance(module, LoraLayer))

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """The base model, for the DPO reference. Flags only: no parameter changes its requires_grad."""
        layers = list(self._lora_layers())
        assert layers, "adapter_off needs an adapter"
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in layers:
                layer._disable_adapters = False

    @contextmanager
    def reference_adapter(self) -> Iterator[None]:
        """The frozen adapter under that name, REFERENCE_ADAPTER, in the place of the trained one. Flags only, too."""
        layers = list(self._lora_layers())
        active = [layer._active_adapter for layer in layers]
        for layer in layers:
            layer._active_adapter = [REFERENCE_ADAPTER]
        try:
            yield
        finally:
            for layer, names in zip(layers, active, strict=True):
                layer._active_adapter = names

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[list[int]]:
        """Greedy continuations of `prompts` (token ids), up to and including the end token.

        The packed attention has no cache and no mask, so the model answers with transformers' own `sdpa`, left-padded,
        in evaluation mode and uncompiled; all of it is restored afterwards. Sharded, all ranks call it with the same
        number of prompts, since every layer is gathered by all of them. Once `stop()`, which is asked at each token,
        says so, the answers end where they are.
        """

        def stopped(ids: Tensor, _scores: Any, **_: Any) -> Tensor:
            return torch.full((len(ids),), stop(), dtype=torch.bool, device=ids.device)

        greedy = GenerationConfig(
            max_new_tokens=max_new_tokens, pad_token_id=self.pad_token, eos_token_id=self.end_token, do_sample=False
        )
        lm = self.causal_lm
        device = lm.lm_head.weight.device
        answers: list[list[int]] = []
        # Prompts of like length share a batch: less padding, and the first ones are the longest.
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        with self._answering():
            for start in range(0, len(order), SAMPLED_TOGETHER):
                chosen = [prompts[index] for index in order[start : start + SAMPLED_TOGETHER]]
                width = max(len(prompt) for prompt in chosen)
                ids = torch.tensor([[self.pad_token] * (width - len(prompt)) + prompt for prompt in chosen])
                mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in chosen])
                generated: Tensor = lm.generate(  # type: ignore[operator]
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    generation_config=greedy,
                    stopping_criteria=[stopped],
                    synced_gpus=self.sharded,
                )
                answers += [self._until_end(row) for row in generated[:, width:].tolist()]
        by_prompt = dict(zip(order, answers, strict=True))
        return [by_prompt[index] for index in range(len(prompts))]

    @contextmanager
    def _answering(self) -> Iterator[None]:
        lm = self.causal_lm
        implementation, generation = lm.config._attn_implementation, lm.generation_config
        # generate() takes from the model's own what it is not given: Qwen2.5's penalty of repetition is not greedy.
        lm.generation_config = GenerationConfig()
        lm.set_attn_implementation("sdpa")
        torch.compiler.set_stance("force_eager")
        try:
            with evaluating(self):
                yield
        finally:
            torch.compiler.set_stance("default")
            lm.generation_config = generation
            lm.set_attn_implementation(implementation)

    def _until_end(self, ids: list[int]) -> list[int]:
        return ids[: ids.index(self.end_token) + 1] if self.end_token in ids else ids


def _draws_masks(lm: PreTrainedModel) -> bool:
    """Whether training draws dropout masks: an adapter's, a continued one's too, or those of the model's attention."""
    layers = (module for module in lm.modules() if isinstance(module, nn.Dropout))
    return lm.config.attention_dropout > 0 or any(layer.p > 0 for layer in layers)


def trainable_parameters(model: PackedLM) -> dict[str, nn.Parameter]:
    """Trained parameters by the names that PEFT / transformers write on disk."""
    if model.sharded:  # a forward without backward leaves weights gathered, as tensors that the optimizer does not know
        for module in model.modules():
            if callable(reshard := getattr(module, "reshard", None)):
                reshard()
    named = model.lm.named_parameters()
    return {name.replace(".default.", "."): parameter for name, parameter in named if parameter.requires_grad}


def num_adapter_parameters(model: PackedLM) -> int | None:
    """Number of adapter parameters; None in full training."""
    count = sum(parameter.numel() for parameter in trainable_parameters(model).values())
    return count if isinstance(model.lm, PeftModel) else None


def load_trainable(model: PackedLM, tensors: dict[str, Tensor]) -> None:
    """Put saved values into the trained parameters; ValueError if names or shapes are not the same."""
    parameters = trainable_parameters(model)
    if parameters.keys() != tensors.keys():
        missing, extra = parameters.keys() - tensors.keys(), tensors.keys() - parameters.keys()
        raise ValueError(
            f"checkpoint: its parameters do not fit the model, missing {sorted(missing)[:3]}, unknown "
            f"{sorted(extra)[:3]}; resume with the config that wrote it"
        )
    for name, parameter in parameters.items():
        saved, own = list(tensors[name].shape), list(parameter.shape)
        if saved != own:
            raise ValueError(
                f"checkpoint: {name} is {saved} there and {own} in the model; what gives trained weights their shapes, "
                "as lora.r does, cannot change on resume: restore it, or choose another run.name (model.adapter starts "
                "from the adapter of a finished run)"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
