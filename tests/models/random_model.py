"""Small random models, for tests that compare with transformers."""

import torch


@torch.no_grad()
def write_model(model_type, fields, directory, scale):
    """Write a random fp32 model whose every part shows in the logits, its matrices times `scale`; return it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **fields)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.2 * torch.randn_like(parameter))
        else:
            parameter.mul_(scale)
    model.save_pretrained(directory)
    return model
