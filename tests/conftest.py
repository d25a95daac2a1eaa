"""Fixtures that several test files share: the repository, and tiny random models saved as checkpoints and adapters.

torch, transformers and peft are imported inside the fixtures, so that tests of the numpy layer run without them.
"""

import os
import sys
from pathlib import Path

import pytest
from encoder_sizes import ENCODER_SIZES

# One thread: the models are tiny, and results must not depend on the number of cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

REPOSITORY = Path(__file__).resolve().parents[1]
ADAPTED = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]


def pytest_collection_finish(session: pytest.Session) -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The top level of the repository."""
    return REPOSITORY


@pytest.fixture(scope="session")
def tiny_bert():
    """make(kind, seed) -> a random transformers BERT with 2 layers of width 32; kind: Model, ForMaskedLM, ..."""
    import torch
    import transformers

    torch.set_num_threads(1)

    def make(kind: str = "ForSequenceClassification", seed: int = 0):
        torch.manual_seed(seed)
        config = transformers.BertConfig(**ENCODER_SIZES, num_labels=3)
        model = getattr(transformers, f"Bert{kind}")(config).eval()
        with torch.no_grad():  # a spectrum with a head, unlike the flat one of random initialisation
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(torch.linspace(3.0, 0.3, parameter.shape[1]))
        return model

    return make


@pytest.fixture(scope="session")
def tiny_roberta():
    """make(seed) -> a random RobertaForMaskedLM with 2 layers of width 32, in evaluation mode."""
    import torch
    import transformers

    torch.set_num_threads(1)

    def make(seed: int = 0):
        torch.manual_seed(seed)
        config = transformers.RobertaConfig(**ENCODER_SIZES, pad_token_id=1, bos_token_id=0, eos_token_id=2)
        return transformers.RobertaForMaskedLM(config).eval()

    return make


@pytest.fixture(scope="session")
def add_lora():
    """add(model, seed=0, **config) -> the model with LoRA on its encoder and random factors A and B (B is not zero)."""
    import peft
    import torch

    def add(model, seed: int = 0, **config):
        config = {"r": 4, "lora_alpha": 12, "target_modules": ADAPTED, "modules_to_save": ["classifier"]} | config
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**config)).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
        return wrapped

    return add


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory, tiny_bert) -> Path:
    """A bare BertModel on disk: its tensors are named encoder.layer... without a prefix."""
    folder = tmp_path_factory.mktemp("checkpoints") / "base"
    tiny_bert().bert.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tuned_dir(base_dir: Path, tiny_bert) -> Path:
    """The same encoder as a BertForSequenceClassification, one matrix moved by a strong rank-one update."""
    import torch

    folder = base_dir.parent / "tuned"
    model = tiny_bert()
    weight = model.bert.encoder.layer[1].attention.self.query.weight
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        weight += 20 * torch.outer(torch.randn(32, generator=generator), torch.randn(32, generator=generator)) / 32
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapter_dir(base_dir: Path, tiny_bert, add_lora) -> Path:
    """A PEFT LoRA adapter (r = 4, alpha = 12) with random factors on the same encoder, and its classifier."""
    folder = base_dir.parent / "adapter"
    add_lora(tiny_bert()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def save_tensors():
    """save(folder, tensors, name="model.safetensors") -> the folder, holding these numpy arrays or torch tensors."""
    import safetensors.torch
    import torch

    def save(folder: Path, tensors: dict, name: str = "model.safetensors") -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {key: torch.as_tensor(value).clone().contiguous() for key, value in tensors.items()}
        safetensors.torch.save_file(tensors, folder / name)
        return folder

    return save


@pytest.fixture(scope="session")
def save_adapter(save_tensors):
    """save(folder, factors, **config) -> an adapter folder; factors: {module: (B, A)}, as PEFT names them."""
    import json

    def save(folder: Path, factors: dict, extra: dict | None = None, **config) -> Path:
        rank = next(iter(factors.values()))[1].shape[0]
        tensors = dict(extra or {})
        for module, (B, A) in factors.items():
            tensors[f"base_model.model.{module}.lora_B.weight"] = B
            tensors[f"base_model.model.{module}.lora_A.weight"] = A
        save_tensors(folder, tensors, "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8} | config
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    return save


@pytest.fixture(scope="session")
def tiny_nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random RoBERTa of 2 layers x 32 with an LM head and the miniature language's tokenizer, as a model folder."""
    import torch
    import transformers

    from intruder.models import load_tokenizer, nano_folder

    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny-nano"
    tokenizer = load_tokenizer(str(nano_folder()))
    sizes = ENCODER_SIZES | {"vocab_size": len(tokenizer), "intermediate_size": 64, "max_position_embeddings": 98}
    config = transformers.RobertaConfig(**sizes, pad_token_id=1, bos_token_id=0, eos_token_id=2, type_vocab_size=1)
    transformers.RobertaForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
