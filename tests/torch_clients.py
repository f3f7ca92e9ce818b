"""Run by tests/test_clients.py: trainers that others wrote, with fusedopt.torch in them.

    python tests/torch_clients.py FOLDER CLIENT

Each function below is a client: it trains a small net by that package, once with torch.optim and
once with fusedopt.torch, and asserts that the parameters agree within 1e-6. Where the package saves
the optimizer, a run that resumes must agree with one that went on to the bit. With RANK and
WORLD_SIZE in the environment it is one rank of several. FOLDER is empty.
"""

import contextlib
import copy
import importlib.abc
import importlib.machinery
import random
import sys
import types
from pathlib import Path

import torch

import fusedopt.torch as fo

FOLDER = Path(sys.argv[1])
MODULES = {"fusedopt": fo, "torch": torch.optim}
NARROW = {"state_dtype": "int8", "min_8bit_size": 0}


def seed(number=0):
    random.seed(number)
    torch.manual_seed(number)


def net(width=32):
    seed()
    layers = [torch.nn.Linear(10, width), torch.nn.Tanh(), torch.nn.Linear(width, 4)]
    return torch.nn.Sequential(*layers)


def batch(number, rank=0, world=1):
    x = torch.randn(8, 10, generator=torch.Generator().manual_seed(number))
    return x.chunk(world)[rank]


def full(params):
    """Copies of whole parameters."""
    return [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for p in params]


def same(ours, theirs):
    """The same bits."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def differ(ours, theirs):
    assert any(not torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def agree(run):
    """Compare the parameters that run(module) returns for both modules; return ours."""
    ours, theirs = (run(MODULES[name]) for name in ("fusedopt", "torch"))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    return ours


# ---------------------------------------------------------------- Hugging Face


def language_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    seed()
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def arguments(kind, folder, steps, **more):
    return kind(
        output_dir=str(FOLDER / folder), max_steps=steps, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, max_grad_norm=0.5, learning_rate=0.01, weight_decay=0.1,
        lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 1e-3},
        warmup_steps=2, save_strategy="steps", save_steps=3, report_to=[], disable_tqdm=True,
        use_cpu=True, seed=0, logging_steps=100, **more,
    )  # fmt: skip


def lines(count=64):
    generator = torch.Generator().manual_seed(7)
    return [
        {"input_ids": row, "attention_mask": [1] * 12, "labels": row}
        for row in torch.randint(3, 64, (count, 12), generator=generator).tolist()
    ]


def hf_run(make, name, model=language_model):
    """Train 6 steps; again from the checkpoint of the third; compare; return the parameters."""

    def run(module, **options):
        known = f"{name}-{module.__name__}-{len(options)}"
        cls = (module.AdamW, {"lr": 0.01, "betas": (0.9, 0.95), **options})
        trainer = make(model(), known, cls)
        trainer.train()
        assert isinstance(trainer.optimizer.optimizer, module.AdamW)
        whole = full(trainer.model.parameters())
        resumed = make(model(), known, cls)
        resumed.train(resume_from_checkpoint=str(FOLDER / known / "checkpoint-3"))
        same(full(resumed.model.parameters()), whole)
        return whole

    ours = agree(run)
    differ(run(fo, **NARROW), ours)  # 8-bit state is saved and resumed too
    return ours


def hf_trainer():
    """optimizer_cls_and_kwargs, with accumulation, clip, schedule, save and resume."""
    from transformers import Trainer, TrainingArguments

    def make(model, folder, cls):
        args = arguments(TrainingArguments, folder, 6)
        return Trainer(model, args, train_dataset=lines(), optimizer_cls_and_kwargs=cls)

    hf_run(make, "hf")


def trl():
    """SFTTrainer; the same arguments."""
    import datasets
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w3"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="w0", eos_token="w2")

    # with a fingerprint of its own: some versions of datasets and of pyarrow do not find one
    data = datasets.Dataset(datasets.table.InMemoryTable.from_pylist(lines()), fingerprint="lines")

    def make(model, folder, cls):
        args = arguments(
            SFTConfig, folder, 6, max_length=16, bf16=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        )  # fmt: skip
        return SFTTrainer(
            model, args, train_dataset=data, processing_class=tokenizer,
            optimizer_cls_and_kwargs=cls,
        )  # fmt: skip

    hf_run(make, "trl")


def peft():
    """LoRA+, whose groups are of some parameters, and rates of their own; the rest is frozen."""
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    def run(module, **options):
        model = get_peft_model(language_model(), LoraConfig(r=4, target_modules=["q_proj"]))
        opt = create_loraplus_optimizer(
            model, module.AdamW, lr=0.01, loraplus_lr_ratio=4.0, loraplus_weight_decay=0.1,
            **options,
        )  # fmt: skip
        rows = torch.tensor([line["input_ids"] for line in lines(8)])
        for _ in range(4):
            opt.zero_grad()
            model(input_ids=rows, labels=rows).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            opt.step()
        return full(model.parameters())

    differ(run(fo, **NARROW), agree(run))


def accelerate():
    """prepare, accumulate, clip_grad_norm_, a schedule, save_state and load_state, bfloat16."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)

    def run(module, **options):
        folder = str(FOLDER / f"state-{module.__name__}-{len(options)}")
        model = net()
        opt = module.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, **options)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 10)
        model, opt, schedule = accelerator.prepare(model, opt, schedule)

        def train(numbers):
            for number in numbers:
                with accelerator.accumulate(model):
                    accelerator.backward(model(batch(number)).square().mean())
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 0.5)
                    opt.step()
                    schedule.step()
                    opt.zero_grad()

        train(range(8))
        accelerator.save_state(folder)
        train(range(8, 16))
        whole = full(model.parameters())
        accelerator.load_state(folder)
        train(range(8, 16))
        same(full(model.parameters()), whole)
        accelerator.free_memory()
        return whole

    differ(run(fo, **NARROW), agree(run))


# ---------------------------------------------------------------- others


def lightning():
    """configure_optimizers, clipping by Lightning, accumulation, a schedule, a checkpoint."""
    import pytorch_lightning as pl

    def run(module, **options):
        class Task(pl.LightningModule):
            def __init__(self):
                super().__init__()
                self.net = net()

            def training_step(self, rows, _):
                return self.net(rows).square().mean()

            def configure_optimizers(self):
                opt = module.AdamW(self.parameters(), lr=0.01, weight_decay=0.1, **options)
                schedule = torch.optim.lr_scheduler.LinearLR(opt, 0.5, 1.0, 4)
                return [opt], [{"scheduler": schedule, "interval": "step"}]

        path = FOLDER / f"{module.__name__}-{len(options)}.ckpt"

        class Save(pl.Callback):
            def on_train_epoch_end(self, trainer, task):
                if trainer.current_epoch == 0:
                    trainer.save_checkpoint(path)

        def fit(**resume):
            task = Task()
            data = torch.utils.data.DataLoader([x for n in range(8) for x in batch(n)], 4)
            trainer = pl.Trainer(
                max_epochs=2, accelerator="cpu", devices=1, gradient_clip_val=0.5,
                accumulate_grad_batches=2, callbacks=[Save()], logger=False,
                enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                default_root_dir=FOLDER,
            )  # fmt: skip
            trainer.fit(task, data, **resume)
            return full(task.parameters())

        whole = fit()
        same(fit(ckpt_path=path), whole)
        return whole

    differ(run(fo, **NARROW), agree(run))


class Anything:
    """Stands in for streams and events of CUDA, which here have nothing to wait for."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: Anything()

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass


@contextlib.contextmanager
def without_cuda(module):
    """Let a module that offloads from CUDA find its streams and pinned memory here."""

    class Torch(types.ModuleType):
        cuda = types.SimpleNamespace(
            Stream=Anything, stream=lambda stream: stream, current_stream=Anything
        )

        def __getattr__(self, name):
            return getattr(torch, name)

        @staticmethod
        def empty(*args, pin_memory=False, **kwargs):
            return torch.empty(*args, **kwargs)

        @staticmethod
        def empty_like(*args, pin_memory=False, **kwargs):
            return torch.empty_like(*args, **kwargs)

    pin, torch.Tensor.pin_memory = torch.Tensor.pin_memory, lambda self: self
    module.torch = Torch("torch")
    try:
        yield
    finally:
        module.torch, torch.Tensor.pin_memory = torch, pin


def torchao():
    """CPUOffloadOptimizer: one optimizer for each tensor, whose ``.grad`` stays there."""
    from torchao.optim import cpu_offload

    cpu_offload.get_available_devices = lambda: ["cuda"]

    def run(module, **options):
        model, resumed = net(), net()
        options = {"lr": 0.01, "weight_decay": 0.1, "minimal_size": 0, **options}

        def make(model):
            cls = module.AdamW
            return cpu_offload.CPUOffloadOptimizer(model.parameters(), cls, **options)

        def train(model, opt, numbers):
            for number in numbers:
                model(batch(number)).square().mean().backward()
                opt.step()
                opt.zero_grad()
                for group in opt.param_groups:
                    group["lr"] *= 0.9

        with without_cuda(cpu_offload):
            opt = make(model)
            assert len(opt.optim_dict) == 4
            train(model, opt, range(4))
            resumed.load_state_dict(model.state_dict())
            other = make(resumed)
            other.load_state_dict(copy.deepcopy(opt.state_dict()))
            for net_, opt_ in ((model, opt), (resumed, other)):
                train(net_, opt_, range(4, 8))
        same(full(resumed.parameters()), full(model.parameters()))
        return full(model.parameters())

    differ(run(fo, **NARROW), agree(run))


class OnCuda(torch.nn.Parameter):
    """A parameter that says that it is on a GPU."""

    is_cuda = True


def megatron():
    """HybridDeviceOptimizer: sub-optimizers, groups and state reassigned around every step."""
    from megatron.core.optimizer.cpu_offloading import hybrid_optimizer

    def run(module, overlap=True, fraction=1.0, dtype=torch.bfloat16, **options):
        def make(model):
            for layer in (model[0], model[2]):
                for name, param in list(layer.named_parameters()):
                    layer._parameters[name] = OnCuda(param.detach())
            params = list(model.parameters())
            groups = [{"params": params[::2], "wd_mult": 1.0},
                      {"params": params[1::2], "wd_mult": 0.0, "weight_decay": 0.0}]  # fmt: skip
            return hybrid_optimizer.HybridDeviceOptimizer(
                groups, offload_fraction=fraction, cpu_optimizer_cls=module.AdamW,
                gpu_optimizer_cls=torch.optim.AdamW,
                param_update_in_fp32=dtype != torch.float32,
                overlap_cpu_optimizer_d2h_h2d=overlap, lr=0.01, weight_decay=0.1,
                betas=(0.9, 0.95), eps=1e-8, bias_correction=True, fused=True, **options,
            )  # fmt: skip

        def train(model, opt, numbers):
            for number in numbers:
                opt.zero_grad()
                model(batch(number).to(dtype)).float().square().mean().backward()
                for group in opt.param_groups:
                    group["lr"] = 0.01 / (1 + number)
                opt.step()

        model, resumed = net().to(dtype), net().to(dtype)
        with without_cuda(hybrid_optimizer):
            opt = make(model)
            train(model, opt, range(4))
            other = make(resumed)
            resumed.load_state_dict(model.state_dict())
            other.load_state_dict(copy.deepcopy(opt.state_dict()))
            for net_, opt_ in ((model, opt), (resumed, other)):
                train(net_, opt_, range(4, 8))
        same(full(resumed.parameters()), full(model.parameters()))
        return full(model.parameters())

    for overlap in (True, False):
        for dtype in (torch.float32, torch.bfloat16):
            agree(lambda module, overlap=overlap, dtype=dtype: run(module, overlap, dtype=dtype))
    differ(run(fo, dtype=torch.float32, **NARROW), run(fo, dtype=torch.float32))


class NoTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds empty classes in any module of torchvision, whose builds go with one of torch."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        class Name(type):
            def __getattr__(cls, name):  # a member of what is an enumeration there
                return name

        class Empty(types.ModuleType):
            def __getattr__(self, name):
                if name.startswith("__"):
                    raise AttributeError(name)
                return Name(name, (), {"__init__": lambda self, *args, **options: None})

        return Empty(spec.name)

    def exec_module(self, module):
        module.__version__ = "0.20"


def timm():
    """Its registry, groups without decay, and schedule, of which none need torchvision."""
    sys.meta_path.insert(0, NoTorchvision())
    import timm.optim
    import timm.scheduler
    from timm.optim import _optim_factory as factory

    def run(module, **options):
        model = net()
        factory.default_registry.register(factory.OptimInfo("ours", module.AdamW, has_betas=True))
        opt = timm.optim.create_optimizer_v2(model, "ours", lr=0.01, weight_decay=0.1, **options)
        assert [group["weight_decay"] for group in opt.param_groups] == [0.0, 0.1]
        schedule = timm.scheduler.CosineLRScheduler(opt, t_initial=8, warmup_t=2)
        for number in range(8):
            opt.zero_grad()
            model(batch(number)).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            opt.step()
            schedule.step(number + 1)
        return full(model.parameters())

    differ(run(fo, **NARROW), agree(run))


# ---------------------------------------------------------------- on several ranks


def accelerate_fsdp():
    """FSDP2 with its parameters on the CPU, prepared by accelerate; saved and loaded by it."""
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState
    from accelerate.utils import fsdp_utils
    from torch.distributed.fsdp import CPUOffloadPolicy

    def run(module, **options):
        AcceleratorState._reset_state()
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, cpu_offload=True, auto_wrap_policy="size_based_wrap", min_num_params=1,
            state_dict_type="SHARDED_STATE_DICT",
        )  # fmt: skip
        plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin, gradient_accumulation_steps=2)
        accelerator.state.distributed_type = DistributedType.FSDP  # which it takes for GPUs alone
        accelerator.state.fsdp_plugin = plugin
        rank, world = accelerator.process_index, accelerator.num_processes
        folder = str(FOLDER / f"fsdp-{module.__name__}-{len(options)}")
        model = net()
        opt = module.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, **options)
        model, opt = accelerator.prepare(model, opt)
        assert all(hasattr(p, "to_local") for p in model.parameters())

        def train(numbers):
            for number in numbers:
                with accelerator.accumulate(model):
                    rows = batch(number, rank, world)
                    accelerator.backward(model(rows).square().mean())
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 0.5)
                    opt.step()
                    opt.zero_grad()

        train(range(4))
        accelerator.wait_for_everyone()
        fsdp_utils.save_fsdp_model(plugin, accelerator, model, folder)
        fsdp_utils.save_fsdp_optimizer(plugin, accelerator, opt, model, folder)
        train(range(4, 8))
        whole = full(model.parameters())
        fsdp_utils.load_fsdp_model(plugin, accelerator, model, folder)
        fsdp_utils.load_fsdp_optimizer(plugin, accelerator, opt, model, folder)
        train(range(4, 8))
        same(full(model.parameters()), whole)
        accelerator.free_memory()
        return whole

    differ(run(fo, **NARROW), agree(run))


def verl():
    """Its builder of optimizers and its clip, with FSDP2 and CPUOffloadPolicy as in its engine."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
    from verl.utils import fsdp_utils
    from verl.workers.config.optimizer import FSDPOptimizerConfig, build_optimizer

    fsdp_utils.get_device_id = lambda: "cpu"  # where it looks for a GPU
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))

    def run(module, **options):
        def make():
            model = net(width=33)  # which does not divide by the number of ranks
            for layer in (model[0], model[2], model):
                fully_shard(layer, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
            assert isinstance(model, FSDPModule)
            config = FSDPOptimizerConfig(
                lr=0.01, weight_decay=0.1, betas=[0.9, 0.95], optimizer="AdamW", clip_grad=0.5,
                optimizer_impl=module.__name__, override_optimizer_config=options or None,
            )  # fmt: skip
            return model, build_optimizer(model.parameters(), config), config

        def train(model, opt, config, numbers):
            for number in numbers:
                opt.zero_grad()
                for part in range(2):
                    model.set_requires_gradient_sync(part == 1)
                    rows = batch(2 * number + part, rank, world)
                    (model(rows).square().mean() / 2).backward()
                norm = fsdp_utils.fsdp2_clip_grad_norm_(
                    model.parameters(), max_norm=config.clip_grad
                )
                norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
                assert torch.isfinite(norm)
                opt.step()

        model, opt, config = make()
        assert type(opt) is module.AdamW
        train(model, opt, config, range(4))
        fsdp_utils.offload_fsdp_optimizer(opt)
        fsdp_utils.load_fsdp_optimizer(opt, "cpu")
        path = FOLDER / f"verl-{module.__name__}-{len(options)}-{rank}.pt"  # as its checkpoints
        torch.save([model.state_dict(), opt.state_dict()], path)
        resumed, other, _ = make()
        states = torch.load(path, weights_only=False)
        resumed.load_state_dict(states[0])
        other.load_state_dict(states[1])
        for net_, opt_ in ((model, opt), (resumed, other)):
            train(net_, opt_, config, range(4, 8))
        same(full(resumed.parameters()), full(model.parameters()))
        return full(model.parameters())

    differ(run(fo, **NARROW), agree(run))
    dist.destroy_process_group()


if __name__ == "__main__":
    for client in sys.argv[2:]:
        globals()[client]()
        print(f"{client}: passed")
