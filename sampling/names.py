"""Names that a user may give, apart from what imports torch, so that the command's help answers at once."""

from typing import Literal

SamplerName = Literal[
    "ddpm",
    "ddim",
    "euler",
    "heun",
    "kar1",
    "kar2",
    "rk45",
    "reverse-diffusion",
    "euler-maruyama",
    "dpm-solver++",
]
GridName = Literal["own", "karras"]
