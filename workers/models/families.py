"""Which families of models there are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class FamilyRecord:
    """One family: the module that describes it, its architectures, and the kinds of checkpoints.

    `limits` says what is refused or differs; what was verified stands in `verified.py`.
    """

    module: str
    models: str
    architectures: tuple[str, ...]
    kinds: tuple[str, ...] = ("safetensors",)
    limits: str = ""


_BOTH = ("safetensors", "gguf")
_STATES = "sums of the layers are kept in the model's number format, whatever residual_in_fp32 says"
FAMILIES = {
    "llama": FamilyRecord(
        module="llama",
        models="Llama 1 to 3.3, SmolLM2, SmolLM3, Mistral, Ministral, Granite 3, Seed-OSS, Arcee",
        architectures=(
            "LlamaForCausalLM",
            "MistralForCausalLM",
            "MinistralForCausalLM",
            "SmolLM3ForCausalLM",
            "GraniteForCausalLM",
            "SeedOssForCausalLM",
            "ArceeForCausalLM",
        ),
        kinds=_BOTH,
    ),
    "qwen2": FamilyRecord(
        module="qwen",
        models="Qwen2, Qwen2.5, QwQ, Qwen2-MoE",
        architectures=("Qwen2ForCausalLM", "Qwen2MoeForCausalLM"),
        kinds=_BOTH,
        limits="GGUF of the dense models only",
    ),
    "qwen3": FamilyRecord(
        module="qwen",
        models="Qwen3, Qwen3-MoE",
        architectures=("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
        kinds=_BOTH,
        limits="GGUF of the dense models only",
    ),
    "gemma": FamilyRecord(
        module="gemma", models="Gemma 1", architectures=("GemmaForCausalLM",), kinds=_BOTH
    ),
    "gemma2": FamilyRecord(
        module="gemma", models="Gemma 2", architectures=("Gemma2ForCausalLM",), kinds=_BOTH
    ),
    "gemma3": FamilyRecord(
        module="gemma",
        models="Gemma 3, text",
        architectures=("Gemma3ForCausalLM",),
        kinds=_BOTH,
        limits="no images",
    ),
    "phi3": FamilyRecord(
        module="phi",
        models="Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
        architectures=("Phi3ForCausalLM",),
        limits="LongRoPE: one set of factors for all lengths, the long one where more than the "
        "original context is served",
    ),
    "phi": FamilyRecord(module="phi", models="Phi-1 to Phi-2", architectures=("PhiForCausalLM",)),
    "stablelm": FamilyRecord(
        module="stablelm", models="StableLM 2, 3B, 12B", architectures=("StableLmForCausalLM",)
    ),
    "gpt2": FamilyRecord(
        module="gpt2",
        models="GPT-2",
        architectures=("GPT2LMHeadModel",),
        limits="not with scale_attn_by_inverse_layer_idx",
    ),
    "gpt_bigcode": FamilyRecord(
        module="gpt2", models="StarCoder, SantaCoder", architectures=("GPTBigCodeForCausalLM",)
    ),
    "opt": FamilyRecord(
        module="opt",
        models="OPT",
        architectures=("OPTForCausalLM",),
        limits="not the 350M model (norms after the sums)",
    ),
    "falcon": FamilyRecord(
        module="falcon",
        models="Falcon 7B, 11B, 40B, RW",
        architectures=("FalconForCausalLM",),
        limits="RW: ALiBi is exact, which transformers rounds to bfloat16 beyond 256 tokens",
    ),
    "bloom": FamilyRecord(
        module="bloom", models="BLOOM, BLOOMZ", architectures=("BloomForCausalLM",)
    ),
    "mpt": FamilyRecord(
        module="mpt",
        models="MPT 7B, 30B",
        architectures=("MptForCausalLM", "MPTForCausalLM"),
        limits="ALiBi models with multi-head attention",
    ),
    "starcoder2": FamilyRecord(
        module="starcoder2", models="StarCoder2", architectures=("Starcoder2ForCausalLM",)
    ),
    "chatglm": FamilyRecord(
        module="chatglm",
        models="ChatGLM2, ChatGLM3, GLM-4-9B as first released",
        architectures=("ChatGLMModel", "ChatGLMForConditionalGeneration"),
        limits="needs a tokenizer.json beside it; not ChatGLM 1, not ChatGLM2-32K, no images",
    ),
    "glm": FamilyRecord(module="glm", models="GLM-4-9B", architectures=("GlmForCausalLM",)),
    "glm4": FamilyRecord(module="glm", models="GLM-4-0414", architectures=("Glm4ForCausalLM",)),
    "gpt_neox": FamilyRecord(
        module="neox", models="GPT-NeoX, Pythia", architectures=("GPTNeoXForCausalLM",)
    ),
    "gptj": FamilyRecord(module="gptj", models="GPT-J", architectures=("GPTJForCausalLM",)),
    "codegen": FamilyRecord(module="gptj", models="CodeGen", architectures=("CodeGenForCausalLM",)),
    "olmo": FamilyRecord(module="olmo", models="OLMo 1", architectures=("OlmoForCausalLM",)),
    "olmo2": FamilyRecord(
        module="olmo",
        models="OLMo 2, OLMo 3",
        architectures=("Olmo2ForCausalLM", "Olmo3ForCausalLM"),
    ),
    "olmoe": FamilyRecord(
        module="olmo",
        models="OLMoE",
        architectures=("OlmoeForCausalLM",),
        limits="not with clip_qkv",
    ),
    "nemotron": FamilyRecord(
        module="nemotron", models="Nemotron-4, Minitron", architectures=("NemotronForCausalLM",)
    ),
    "gpt_neo": FamilyRecord(
        module="gptneo", models="GPT-Neo", architectures=("GPTNeoForCausalLM",)
    ),
    "cohere": FamilyRecord(
        module="cohere",
        models="Command-R, Command-R+, Command-R7B, Command-A",
        architectures=("CohereForCausalLM", "Cohere2ForCausalLM"),
    ),
    "exaone4": FamilyRecord(
        module="exaone", models="EXAONE 4", architectures=("Exaone4ForCausalLM",)
    ),
    "helium": FamilyRecord(module="llama", models="Helium", architectures=("HeliumForCausalLM",)),
    "ernie4_5": FamilyRecord(
        module="llama", models="ERNIE 4.5, dense", architectures=("Ernie4_5ForCausalLM",)
    ),
    "mixtral": FamilyRecord(
        module="mixtral", models="Mixtral 8x7B, 8x22B", architectures=("MixtralForCausalLM",)
    ),
    "gpt_oss": FamilyRecord(
        module="gptoss",
        models="gpt-oss 20B, 120B, in bfloat16",
        architectures=("GptOssForCausalLM",),
        limits="not as released, in MXFP4",
    ),
    "deepseek": FamilyRecord(
        module="deepseek",
        models="DeepSeek-V2, V2.5, V2-Lite, V3, R1, in bfloat16",
        architectures=("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"),
        limits="the KV pool holds every head's keys and values, cut by heads, values padded to the "
        "size of keys, and not the small vector that they are made from: for V3, 96 KiB a token "
        "and layer over all ranks where the vector would take 1.1 KiB on each; no FP8, no "
        "multi-token prediction, whose layer is left unread",
    ),
    "mamba": FamilyRecord(
        module="mamba",
        models="Mamba 130M to 2.8B, FalconMamba",
        architectures=("MambaForCausalLM", "FalconMambaForCausalLM"),
        limits=_STATES,
    ),
    "mamba2": FamilyRecord(
        module="mamba",
        models="Mamba-2, Mamba-Codestral",
        architectures=("Mamba2ForCausalLM",),
        limits=_STATES,
    ),
}
ARCHITECTURES = {
    architecture: name for name, record in FAMILIES.items() for architecture in record.architectures
}
