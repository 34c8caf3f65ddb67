"""Prompts for calibrating text-conditional models: a built-in list of diverse prompts, or a file given by the user."""

from __future__ import annotations

from pathlib import Path

from edm_deploy.pipelines.prompt_file import read_prompts

# Varied in subject, style, light, counts, written words and length, because ranges must cover the prompts of real use. The last is the empty prompt.
PROMPTS = (
    "a photograph of a red bicycle leaning against a stone wall",
    "two children building a sandcastle at low tide, evening light",
    "portrait of an old fisherman, wrinkled face, grey beard, soft window light, 85mm",
    "a bowl of ramen with a soft-boiled egg, seen from above",
    "oil painting of a harbour in fog, muted colours, thick brush strokes",
    "an astronaut repairing a satellite, the Earth behind her, highly detailed",
    "isometric drawing of a small bakery, pastel colours",
    "a black cat asleep on a pile of newspapers",
    "the inside of a gothic cathedral, light through stained glass, wide angle",
    "macro photograph of a bee on a sunflower",
    "watercolour of a mountain village after the first snow",
    "a steam locomotive crossing an iron bridge in the rain",
    "a glass of water on a wooden table",
    "low poly render of a fox in a birch forest",
    "street market in Marrakesh, crowded, noon, saturated colours, documentary photograph",
    "pencil sketch of a sitting dog",
    "a modern kitchen with green cabinets and brass handles, interior photography",
    "an empty highway through the desert, heat haze, film grain",
    "a knight in rusted armour kneeling in a meadow, overcast sky, cinematic",
    "logo of a mountain and a river, flat design, two colours",
    "a chessboard in the middle of a game, shallow depth of field",
    "northern lights over a frozen lake, long exposure",
    "a plate with three red apples and one green apple",
    "woman in a yellow raincoat waiting for a tram at night, neon reflections on wet asphalt",
    "a hand holding a small origami crane, black background",
    "blueprint of a wooden sailing ship",
    "a whale swimming between skyscrapers, surreal, digital painting",
    "a library with spiral stairs and thousands of books, warm lamps",
    "satellite image of a river delta",
    "a corgi wearing round glasses, studio photograph, plain blue background",
    "ancient map of an island with sea monsters, parchment",
    "a greenhouse full of tropical plants, condensation on the glass",
    "a violin, disassembled, its parts laid out in order, knolling photograph",
    "an elderly couple dancing in a kitchen",
    "pixel art of a castle on a floating rock",
    "a bowl of oranges in the style of a Dutch still life, chiaroscuro",
    "an ice climber on a frozen waterfall, seen from below",
    "a school bus under cherry trees in bloom",
    "a sign that says OPEN in the window of a barber shop",
    "x-ray of a seashell",
    "sunset",
    "a dragon made of autumn leaves",
    "a wind turbine field in the morning mist, aerial photograph",
    "fashion photograph, man in a grey wool coat, concrete stairs, hard shadow",
    "stained glass window that shows a hummingbird",
    "a toy robot standing on a keyboard",
    "children's book illustration of a hedgehog who moves house with a wheelbarrow full of mushrooms, ink and gouache, friendly, detailed",
    "a horse galloping through shallow water, frozen motion, 1/4000 s",
    "a brutalist apartment block covered with ivy, golden hour",
    "four hot air balloons above a valley",
    "an operating theatre, surgeons at work, blue light",
    "a cup of coffee, a croissant and a newspaper on a marble table, Paris, spring, analogue photograph, faded colours, slight vignette",
    "the surface of Mars at dawn, a small rover in the distance",
    "charcoal drawing of a dancer",
    "a slice of chocolate cake",
    "cross section of a volcano, textbook illustration with labels",
    "an owl on a fence post, snow falling, telephoto lens",
    "a crowd at a football stadium with flags and smoke",
    "minimalist poster of a lighthouse, screen print",
    "a robot hand and a human hand reaching for each other, renaissance fresco, cracked plaster",
    "a small wooden boat on a perfectly still lake, mirrored mountains, symmetrical, blue hour, ultra wide, 8k",
    "plush toy of an octopus, product photograph",
    "a violet square next to a white circle",
    "",
)


def prompts_of(path: Path | None) -> tuple[str, ...]:
    """The prompts of a text file, one per line, or the built-in ones.

    Args:
        path: UTF-8; empty lines are skipped. None selects the built-in list.

    Raises:
        InputError: The file cannot be read, or contains no prompt.
    """
    return PROMPTS if path is None else read_prompts(path)
