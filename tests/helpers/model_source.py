"""A Hugging Face model as a source of weights."""

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class ModelSource:
    """A Hugging Face model as a WeightSource."""

    def __init__(self, model):
        self.model = model

    def fused_groups(self):
        groups = {}
        for name, _ in self.model.named_parameters():
            key = name
            for members in FUSED:
                for member in members:
                    key = key.replace(f".{member}.", f".{members[0]}.")
            groups.setdefault(key, []).append(name)
        return [tuple(names) for names in groups.values()]

    def iter_weights(self, dtype):
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach().to(dtype)
