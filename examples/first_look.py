"""A first look into a backdoored CLIP: which heads the trigger moves, and where they look.

Command:   python examples/first_look.py
Run time:  a few seconds.

The cells (`# %%`) run one by one in VS Code, PyCharm, Spyder, or in Jupyter through Jupytext.
"""

# %% A bundled model, its world, and its trigger (its card tells it)
from __future__ import annotations

import torch

import decompclip
from decompclip import MeanAblate, Moments, Shapes, heads
from decompclip.attacks.registry import from_card
from decompclip.evaluation.metrics import predict
from decompclip.models.bundled import card

model = decompclip.load("shapes-badnet")
backdoor = card("shapes-badnet")["backdoor"]
trigger = from_card(backdoor["trigger"])
world = Shapes(400, seed=11)
batch = world.draw(range(400))
clean, triggered = model.normalize(batch.images), model.normalize(trigger(batch.images, batch.indices))

# %% The trigger works
classifier = model.zero_shot_classifier()
names = world.class_names
target = names.index(backdoor["target"])
for what, images in (("clean", clean), ("triggered", triggered)):
    share = (predict(model.encode_image(images), classifier) == target).double().mean()
    print(f"{what}: {100 * share:.1f} % are taken for {names[target]!r}")

# %% Which heads move toward the target? Terms sum to the feature, so their projections sum to the logit
before, after = model.decompose(clean), model.decompose(triggered)
direction = classifier[target] - classifier.mean(0)
push = (after.heads - before.heads).mean(0) @ direction  # [layer, head]
moved = push.flatten().topk(3).indices.tolist()
for layer, head in (divmod(index, before.n_heads) for index in moved):
    print(f"head {layer}.{head} pushes by {push[layer, head]:+.3f}; all heads together by {push.sum():+.3f}")

# %% Where does the first of them look? Contributions of single tokens, contracted with the text inside the head
layer, head = divmod(moved[0], before.n_heads)
tokens = model.decompose(triggered[:64], tokens=heads[layer, head])
per_patch = tokens.token_logits(direction[None], layer, head)[:, 1:, 0]  # the class token apart
rows, columns = model.cfg.grid
masks = trigger.mask(*model.image_size, indices=batch.indices[:64])
patches = masks.unflatten(1, (rows, -1)).unflatten(3, (columns, -1)).any(4).any(2).flatten(1)
hits = patches[torch.arange(64), per_patch.argmax(1)].double().mean()
print(f"its strongest patch lies on the trigger in {100 * hits:.0f} % of the images")

# %% What if it were silent? The direct effect on the terms, the causal one in a real forward pass
moments = Moments.fit(model, [clean[:200]])
ablate = MeanAblate(heads[layer, head], moments)
with model.hooks(ablate), torch.no_grad():
    causal = model.encode_image(triggered[200:])
for mode, features in (("direct", ablate(after[200:]).features), ("causal", causal)):
    share = (predict(features, classifier) == target).double().mean()
    print(f"without it ({mode}): {100 * share:.1f} % of the triggered images are taken for {names[target]!r}")
