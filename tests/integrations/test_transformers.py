"""HuggingFace's Trainer with ``optimizer_cls_and_kwargs``: clipping, bf16 autocast, a schedule, resuming."""

import pytest
import torch
import transformers

import fused_adamw

STEPS = 8


class Counting(torch.utils.data.Dataset):
    """Sequences that count modulo 32: each token tells the next."""

    def __len__(self):
        return 64

    def __getitem__(self, i):
        tokens = (torch.arange(16) + i) % 32
        return {"input_ids": tokens, "labels": tokens}


def trainer(folder, optimizer, steps=STEPS, callbacks=(), **arguments):
    transformers.set_seed(0)
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=steps,
        per_device_train_batch_size=8,
        max_grad_norm=0.5,
        lr_scheduler_type="cosine",
        learning_rate=1e-2,
        weight_decay=0.1,
        logging_steps=1,
        save_steps=4,
        report_to=[],
        disable_tqdm=True,
        **arguments,
    )
    return transformers.Trainer(
        model=transformers.GPT2LMHeadModel(config),
        args=arguments,
        train_dataset=Counting(),
        optimizer_cls_and_kwargs=(optimizer, {"lr": 1e-2, "betas": (0.9, 0.99)}),
        callbacks=list(callbacks),
    )


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("bf16", [False, True])
def test_a_run_follows_torchs(bf16, tmp_path):
    runs = [trainer(tmp_path / m.__name__, m.AdamW, bf16=bf16) for m in (fused_adamw, torch.optim)]
    for run in runs:
        run.train()
    ours, torchs = map(losses, runs)
    assert len(ours) == STEPS
    assert ours == pytest.approx(torchs, rel=0.02 if bf16 else 1e-4)
    assert ours[-1] < ours[0] - 0.5
    optimizer = getattr(runs[0].optimizer, "optimizer", runs[0].optimizer)
    assert type(optimizer) is fused_adamw.AdamW
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all(own["step"].item() == STEPS for own in optimizer.state.values())


def test_the_recipe_takes_the_learning_rate_along(tmp_path):
    """With no options the Trainer's own is ignored: docs/integrations/recipes.md hands it on."""
    rates = {}
    for options in ({}, {"lr": 1e-2}):
        run = trainer(tmp_path, fused_adamw.AdamW)
        run.optimizer_cls_and_kwargs = (fused_adamw.AdamW, options)
        rates[len(options)] = run.create_optimizer().param_groups[0]["lr"]
    assert rates == {0: 1e-3, 1: run.args.learning_rate}


def test_resuming_gives_the_same_bits(tmp_path):
    whole = trainer(tmp_path / "whole", fused_adamw.AdamW, bf16=True)
    whole.train()
    resumed = trainer(tmp_path / "whole", fused_adamw.AdamW, bf16=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)
