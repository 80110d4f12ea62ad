"""Load a 4-bit folder with weights that are mapped or copied, and train an adapter over it: in a test or a process."""

import peft
import torch
import transformers

from qlora_native.integrations.transformers import BitsAndBytesConfig


def load(folder, mapped, **options):
    """The model of a folder. `options` are those of from_pretrained: `disable_mmap=True` copies what is read."""
    config = BitsAndBytesConfig(load_in_4bit=True, mapped=mapped)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **options)


def adapted(model):
    """The model with an adapter of random values on each linear layer."""
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))


def train(model, checkpoint=True):
    """Losses and gradients of two steps."""
    model = adapted(model)
    if checkpoint:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    ids = torch.arange(8)[None]
    results = []
    for _ in range(2):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        results += [loss.detach(), *(p.grad.clone() for p in trained)]
        optimizer.step()
        optimizer.zero_grad()
    return results
