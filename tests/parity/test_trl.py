"""Losses of reward models, DPO and GRPO against the `trl` library.

Its trainers compute their losses in methods that need a model, an accelerator and a place for
metrics. Here they are called on stand-ins for these, with numbers of ours, in float64; and once for
each of DPO and GRPO with the library's own machinery, from the weights on.
"""

import itertools
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from minillm.align.grpo import group_advantages, grpo_loss
from minillm.align.preference import dpo_loss, written
from minillm.align.reward import ranking_accuracy, ranking_loss
from minillm.align.rollout import Rollout, response_logp
from minillm.config import ModelConfig
from minillm.model import LM
from minillm.model.load import save_pretrained
from minillm.tokenizers import load_course_tokenizer, to_huggingface_json
from minillm.tokenizers.chat import render

trl = pytest.importorskip("trl")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

F64 = torch.float64
LENGTHS = torch.tensor([6, 1, 3, 4, 2, 6])
MASK = torch.arange(6) < LENGTHS[:, None]
ADVANTAGES = torch.tensor([1.0, -2.0, 0.5, -0.3, 0.0, 1.5], dtype=F64)


def alone(**more):
    """A trainer's surroundings, for one process."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
    )
    metrics = {"eval": defaultdict(list)}
    model = torch.nn.Identity().eval()
    model.is_gradient_checkpointing = False
    return SimpleNamespace(
        accelerator=accelerator, _metrics=metrics, model=model, _total_train_tokens=0, **more
    )


def drawn(seed, spread=1.0):
    """log-probabilities of six responses, 0 behind their ends."""
    rng = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(6, 6, generator=rng, dtype=F64) - 2).where(MASK, 0.0)


# -- reward models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 4])
def test_ranking_loss(k):
    """Theirs knows pairs; a ranking of k is the mean over all of its pairs."""
    scores = torch.randn(5, k, generator=torch.Generator().manual_seed(k), dtype=F64)
    pairs = list(itertools.combinations(range(k), 2))
    better = torch.cat([scores[:, i] for i, _ in pairs])
    worse = torch.cat([scores[:, j] for _, j in pairs])
    logits = torch.cat([better, worse])[:, None]
    trainer = alone(args=SimpleNamespace(center_rewards_coefficient=None))

    def model(**inputs):
        return SimpleNamespace(logits=logits)

    theirs = trl.RewardTrainer.compute_loss(trainer, model, {})
    torch.testing.assert_close(ranking_loss(scores), theirs, rtol=1e-12, atol=0)
    assert ranking_accuracy(scores) == pytest.approx(trainer._metrics["eval"]["accuracy"][0])


# -- DPO -------------------------------------------------------------------------------------------


def dpo_trainer(reference, beta):
    return alone(
        ref_model=reference,
        beta=beta,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=False,
        f_divergence_type="reverse_kl",
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        use_weighting=False,
    )


@pytest.mark.parametrize("beta", [0.1, 1.3])
def test_dpo_loss(beta):
    """The first three rows are preferred, in their batches as in ours."""
    ours = drawn(0).requires_grad_()
    theirs, reference = ours.detach().clone().requires_grad_(), drawn(1)

    def says(logp):
        zero = torch.zeros_like(logp.detach())
        told = {"entropy": zero, "mean_logits": zero, "is_top1": zero.bool()}
        return lambda **inputs: SimpleNamespace(log_probs=logp, **told)

    trainer = dpo_trainer(says(reference), beta)
    inputs = {
        "input_ids": torch.zeros(6, 7, dtype=torch.long),
        "attention_mask": torch.ones(6, 7, dtype=torch.long),
        "completion_mask": torch.nn.functional.pad(MASK.long(), (1, 0)),
    }
    wanted = trl.DPOTrainer._compute_loss(trainer, says(theirs), inputs, False)
    loss, rewards = dpo_loss(ours, reference, MASK, beta)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    loss.backward()
    wanted.backward()
    torch.testing.assert_close(ours.grad, theirs.grad.where(MASK, 0.0), rtol=1e-10, atol=1e-14)
    told = trainer._metrics["eval"]
    chosen, rejected = rewards.chunk(2)
    assert told["rewards/chosen"] == [pytest.approx(chosen.mean().item())]
    assert told["rewards/rejected"] == [pytest.approx(rejected.mean().item())]
    assert told["rewards/accuracies"] == [pytest.approx((chosen > rejected).double().mean().item())]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A policy and a reference of ours, and the same as `transformers` has them, in folders."""
    kind = {"norm": "rms", "position": "rope", "mlp": "swiglu", "max_len": 96, "init": "normal"}
    shape = {"vocab_size": 4096, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
    ours = [LM(ModelConfig(**shape, **kind), seed=seed).eval() for seed in (1, 2)]
    folders = [tmp_path_factory.mktemp(name) for name in ("policy", "reference")]
    for model, folder in zip(ours, folders, strict=True):
        with torch.no_grad():
            model.tokens.weight.mul_(4)  # tied to the head: a random model says everything alike
        save_pretrained(model, folder)
    return ours, folders


def read(folder):
    return transformers.LlamaForCausalLM.from_pretrained(folder).eval()


REQUESTS = ["Write a card for Mia about the kite.", "Hi!", "Tom has a drum. Write a card."]
PREFERRED = ["Dear Mia, I like your kite.", "Hello.", "Dear Tom, you are kind. I miss you."]
OTHERS = ["Dear Tom, you are rude.", "", "I am busy now."]


def test_dpo_from_the_weights_on(models):
    """Our models, texts and padding against theirs: the same loss, rewards and gradient."""
    (policy, reference), folders = models
    tokenizer = load_course_tokenizer()
    pairs = written(reference, tokenizer, REQUESTS * 2, PREFERRED + OTHERS)
    loss, rewards = dpo_loss(response_logp(policy, pairs), pairs.logp, pairs.mask, 0.2)
    policy.zero_grad(set_to_none=True)
    loss.backward()

    from trl.trainer.dpo_trainer import DataCollatorForPreference
    from trl.trainer.utils import add_fused_lm_head

    examples = []
    for request, good, bad in zip(REQUESTS, PREFERRED, OTHERS, strict=True):
        prompt = render(tokenizer, [("user", request)], reply=True).ids
        chats = [render(tokenizer, [("user", request), ("assistant", x)]) for x in (good, bad)]
        chosen, rejected = ([i for i, m in zip(c.ids, c.mask, strict=True) if m] for c in chats)
        examples.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    their_policy, their_reference = (read(folder) for folder in folders)
    for model in (their_policy, their_reference):
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    trainer = dpo_trainer(their_reference, 0.2)
    trainer.model = their_policy
    inputs = DataCollatorForPreference(pad_token_id=0)(examples)
    wanted = trl.DPOTrainer._compute_loss(trainer, their_policy, inputs, False)
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    told = trainer._metrics["eval"]["rewards/margins"][0]
    assert told == pytest.approx((rewards[:3] - rewards[3:]).mean().item(), abs=1e-4)
    assert abs(told) > 0.1
    gradient = their_policy.get_input_embeddings().weight.grad
    torch.testing.assert_close(policy.tokens.weight.grad, gradient, rtol=1e-3, atol=1e-5)
    assert gradient.abs().max() > 0.01


# -- GRPO ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize(
    ("loss_type", "normalize"), [("grpo", "sequence"), ("bnpo", "token"), ("dr_grpo", 6 * 9.0)]
)
def test_grpo_loss(loss_type, normalize, beta):
    """`grpo` is the mean of means, `bnpo` that over tokens, `dr_grpo` divides by rows · limit."""
    ours = drawn(0).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    old, reference = ours.detach() + 0.2 * (drawn(1) - ours.detach()), drawn(2, 0.5)
    trainer = alone(
        _get_per_token_logps_and_entropies=lambda *a, **k: (theirs, torch.zeros(6, 6), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=beta,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
        loss_type=loss_type,
        epsilon_low=0.2,
        epsilon_high=0.2,
        use_vllm=False,
        max_completion_length=9,
        _entropy_bonus_enabled=False,
    )
    inputs = {
        "prompt_ids": torch.zeros(6, 2, dtype=torch.long),
        "prompt_mask": torch.ones(6, 2, dtype=torch.long),
        "completion_ids": torch.zeros(6, 6, dtype=torch.long),
        "completion_mask": MASK.long(),
        "advantages": ADVANTAGES,
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
    }
    wanted = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
    found = grpo_loss(ours, old, reference, ADVANTAGES, MASK, 0.2, beta, normalize)
    torch.testing.assert_close(found.loss, wanted, rtol=1e-12, atol=1e-15)
    found.loss.backward()
    wanted.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-14)
    told = trainer._metrics["eval"]["clip_ratio/region_mean"][0]
    assert told == pytest.approx(found.clip_share) and 0 < told < 1


def test_a_step_of_their_grpo_trainer(models, tmp_path):
    """What their trainer sampled and scored gives our advantages, log-probabilities and losses."""
    (policy, reference), folders = models
    tokenizer = load_course_tokenizer()
    end = tokenizer.special_ids["<|endoftext|>"]
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(to_huggingface_json(tokenizer)),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    scores, seen = [], []

    def reward(prompts, completions, **more):
        scores.extend(float(len(set(text))) for text in completions)
        return scores[-len(completions) :]

    class Watched(trl.GRPOTrainer):
        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            seen.append((dict(inputs), loss.detach()))
            return loss

    trainer = Watched(
        model=str(folders[0]),
        reward_funcs=reward,
        args=trl.GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=7,
            beta=0.3,
            loss_type="grpo",
            max_steps=1,
            learning_rate=0.0,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            save_strategy="no",
            shuffle_dataset=False,
        ),
        train_dataset=datasets.Dataset.from_dict({"prompt": REQUESTS}),
        processing_class=fast,
    )
    trainer.ref_model.load_state_dict(read(folders[1]).state_dict())  # not what it starts from
    trainer.train()
    inputs, wanted = seen[0]
    order = inputs["advantages"].argsort()
    advantages = group_advantages(torch.tensor(scores[:8]), 4)
    torch.testing.assert_close(inputs["advantages"][order], advantages.sort().values)
    assert advantages.abs().max() > 0.5
    mask = inputs["completion_mask"].bool()
    completions = inputs["completion_ids"].where(mask, end)
    rollout = Rollout(
        torch.cat([inputs["prompt_ids"], completions], 1),
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1).bool(),
        torch.zeros(mask.shape),
        torch.ones(8, dtype=torch.bool),
    )
    with torch.no_grad():
        logp, against = (response_logp(model, rollout) for model in (policy, reference))
    torch.testing.assert_close(against, inputs["ref_per_token_logps"], rtol=1e-4, atol=1e-4)
    found = grpo_loss(logp, logp, against, inputs["advantages"], mask, beta=0.3)
    torch.testing.assert_close(found.loss, wanted, rtol=1e-4, atol=1e-5)
    assert wanted.abs() > 0.01
