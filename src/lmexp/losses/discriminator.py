"""The discriminator term: images must look real to the network that judged in training."""

from __future__ import annotations

from typing import Annotated, ClassVar, Protocol, cast, runtime_checkable

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lmexp.errors import LmexpError
from lmexp.generators.protocol import Generator
from lmexp.generators.stylegan2_discriminator import StyleGAN2Discriminator
from lmexp.losses.protocol import BoundTerm, Candidate, Context, Targets
from lmexp.weights import store


@runtime_checkable
class BringsDiscriminator(Protocol):
    """A generator whose weights came with those of a discriminator."""

    def discriminator(self) -> StyleGAN2Discriminator:
        """The frozen network, on the generator's device.

        Raises:
            LmexpError: the checkpoint holds none.
        """
        ...


class DiscriminatorLoss:
    """softplus(−D(x)), the non-saturating loss that StyleGAN2's generators were trained with.

    Each image is judged alone, as in the published code, whose batch is one image: the standard
    deviation over a minibatch that D also looks at is then that of a single image. Images are
    not resized: D reads the generator's side.

    Args:
        weight: ≥ 0, λ of the term; the published code's is 0.1.
        checkpoint: whose discriminator: a name of `python -m lmexp.weights list` or a file;
            null: the one that came with the generator's own weights.

    Raises:
        LmexpError: when checked or bound, if there is no discriminator, or it reads images of
            another side than the generator's.

    Source: Goodfellow et al., arXiv 1406.2661; Karras et al., arXiv 1912.04958.
    """

    needs_expression: ClassVar[bool] = False

    def __init__(
        self,
        weight: Annotated[float, Field(ge=0)] = 0.1,
        checkpoint: str | None = None,
    ) -> None:
        self.weight = weight
        self.checkpoint = checkpoint
        self._loaded: tuple[Generator, StyleGAN2Discriminator, str] | None = None

    @property
    def weights_sha256(self) -> str | None:
        """Digest of the network that was last bound, for the run's summary."""
        return self._loaded[2] if self._loaded else None

    def check(self, generator: Generator) -> None:
        """Refuse what `bind` would, before anything is computed."""
        self._load(generator)

    def bind(self, context: Context, targets: Targets) -> BoundTerm:
        network = self._load(context.generator).to(targets.look.device)

        def evaluate(candidate: Candidate) -> Tensor:
            return F.softplus(-cast(Tensor, network(candidate.images)))

        return evaluate

    def _load(self, generator: Generator) -> StyleGAN2Discriminator:
        # A sweep binds once a batch, and a discriminator is as large as a generator.
        if self._loaded is not None and self._loaded[0] is generator:
            return self._loaded[1]
        if self.checkpoint is not None:
            network = _read(self.checkpoint, getattr(generator, "class_index", None))
        elif isinstance(generator, BringsDiscriminator):
            network = generator.discriminator()
        else:
            raise LmexpError(
                f"loss.discriminator: {type(generator).__name__} comes without a discriminator; "
                "give one with loss.discriminator.checkpoint, or leave the term out"
            )
        if network.resolution != generator.resolution:
            raise LmexpError(
                f"loss.discriminator.checkpoint: its discriminator reads {network.resolution} px, "
                f"but the generator makes {generator.resolution} px; give one of that side"
            )
        self._loaded = (generator, network, store.digest(network.state_dict()))
        return network


def _read(checkpoint: str, class_index: int | None) -> StyleGAN2Discriminator:
    """The discriminator of a checkpoint; for the generator's class if it is conditional."""
    # Readers are wanted here alone, not where the generator brings its own.
    from lmexp.checkpoints.checkpoint import load

    loaded = load(store.checkpoint_path(checkpoint, store.say_on_stderr), store.say_on_stderr)
    config = loaded.discriminator
    if config is None:
        raise LmexpError(
            f"loss.discriminator.checkpoint: {checkpoint} holds no discriminator; take a file that "
            "does (NVIDIA's pickles), or leave the term out"
        )
    return StyleGAN2Discriminator(config, loaded.tensors, class_index if config.c_dim else None)
