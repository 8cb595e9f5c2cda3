"""sentence-transformers: its trainer, with ``optimizer_cls_and_kwargs``."""

import pytest
import torch
import transformers
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import fused_adamw

WORDS = {word: i for i, word in enumerate(("[UNK]", *"abcdefgh"))}
PAIRS = {
    "sentence1": ["a b", "c d", "a b", "e f"] * 8,
    "sentence2": ["a b c", "c d e", "g h", "a"] * 8,
    "score": [1.0, 1.0, 0.0, 0.0] * 8,
}


def trained(module, folder):
    transformers.set_seed(0)
    tokenizer = Tokenizer(WordLevel(WORDS, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    torch.manual_seed(0)
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)], device="cpu")
    args = SentenceTransformerTrainingArguments(
        str(folder),
        max_steps=8,
        per_device_train_batch_size=32,  # all of them
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = SentenceTransformerTrainer(
        model,
        args,
        train_dataset=Dataset.from_dict(PAIRS),
        loss=CosineSimilarityLoss(model),
        optimizer_cls_and_kwargs=(module.AdamW, {"lr": args.learning_rate}),
    )
    trainer.train()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    return optimizer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_run_follows_torchs(tmp_path):
    optimizer, ours = trained(fused_adamw, tmp_path / "ours")
    assert type(optimizer) is fused_adamw.AdamW
    assert {own["step"].item() for own in optimizer.state.values()} == {8}
    assert ours == pytest.approx(trained(torch.optim, tmp_path / "torchs")[1], rel=1e-4)
    assert ours[-1] < ours[0] - 0.005
