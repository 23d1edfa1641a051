"""The preset ``mini``: three small tasks, written for this package, which a small language model can do.

They need no download and take seconds, and say less than real benchmarks: a few dozen items each.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    import datasets

_FACTS = """
The capital of France is|Paris|Madrid|Berlin|Vienna
The capital of Japan is|Tokyo|Seoul|Beijing|Bangkok
The capital of Italy is|Rome|Athens|Lisbon|Prague
The capital of Germany is|Berlin|Paris|London|Oslo
The capital of Egypt is|Cairo|Nairobi|Tunis|Lagos
The largest planet in the solar system is|Jupiter|Mars|Venus|Mercury
The planet that is closest to the Sun is|Mercury|Neptune|Saturn|Jupiter
Water freezes at zero degrees|Celsius|Pascal|Newton|Volt
The chemical symbol of oxygen is|O|Fe|Na|Hg
The chemical formula of water is|H2O|CO2|NaCl|CH4
Humans breathe in air with their|lungs|kidneys|bones|ears
The heart pumps|blood|air|food|light
Bees make|honey|milk|wool|silk
Cows give|milk|honey|eggs|oil
Hens lay|eggs|stones|apples|pearls
Fish live in|water|trees|clouds|fire
A triangle has three|sides|wheels|legs|names
A spider has eight|legs|wings|tails|ears
A week has seven|days|months|hours|years
A year has twelve|months|weeks|days|minutes
An hour has sixty|minutes|days|years|weeks
The opposite of hot is|cold|warm|red|tall
The opposite of up is|down|left|over|high
The opposite of big is|small|large|loud|green
The opposite of early is|late|soon|quick|first
The colour of fresh grass is|green|purple|orange|black
The colour of snow is|white|red|green|brown
The colour of blood is|red|blue|green|yellow
Ice is frozen|water|sand|wood|iron
Bread is made from|flour|iron|glass|wool
Paper is made from|wood|gold|milk|salt
Cheese is made from|milk|sand|wood|stone
The Sun rises in the|east|west|north|south
The author of Hamlet is William|Shakespeare|Newton|Washington|Darwin
The theory of relativity is due to Albert|Einstein|Mozart|Lincoln|Picasso
Penguins are birds that cannot|fly|swim|eat|walk
Plants take up water through their|roots|flowers|fruits|seeds
The Amazon is a long|river|desert|island|lake
The Sahara is a large|desert|river|city|forest
Mount Everest is the highest|mountain|building|tree|bridge
A doctor works in a|hospital|cinema|stadium|mine
A teacher works in a|school|kitchen|ship|bank
People see with their|eyes|ears|hands|knees
People hear with their|ears|eyes|feet|teeth
A thermometer measures|temperature|weight|length|time
A clock shows the|time|weather|price|way
A baker bakes|bread|shoes|houses|letters
A carpenter works with|wood|milk|rain|music
"""

_GRAMMAR = """
The dogs are barking.|The dogs is barking.
She goes to school every day.|She go to school every day.
He has never seen the sea.|He have never seen the sea.
They were happy yesterday.|They was happy yesterday.
I am reading a book.|I is reading a book.
We have two cars.|We has two cars.
The child was sleeping.|The child were sleeping.
An apple fell from the tree.|A apple fell from the tree.
He gave it to me.|He gave it to I.
She saw him in the garden.|She saw he in the garden.
There are many people here.|There is many people here.
This book is mine.|These book is mine.
Those flowers are red.|That flowers are red.
He does not like fish.|He do not like fish.
She can swim very well.|She can swims very well.
They want to go home.|They want to goes home.
He went to bed early.|He goed to bed early.
The mice ate the cheese.|The mouses ate the cheese.
I have eaten my lunch.|I have ate my lunch.
She is taller than her brother.|She is more tall than her brother.
This is the best day of all.|This is the goodest day of all.
He drives carefully.|He drives careful.
I look forward to seeing you.|I look forward to see you.
The man who lives here is old.|The man which lives here is old.
He hurt himself.|He hurt herself.
The women told their story.|The women told its story.
If I were you, I would stay.|If I were you, I will stayed.
She asked me where I lived.|She asked me where did I lived.
Neither of them knows the way.|Neither of them know the ways is.
He arrived at the station on time.|He arrived to at station on time.
The letter was written by a friend.|The letter was wrote by a friend.
How many books do you have?|How much books do you have?
Where did you go last night?|Where did you went last night?
She enjoys playing the piano.|She enjoys to playing the piano.
The water is too cold to drink.|The water is too cold for drink it.
He is interested in music.|He is interested on music.
They depend on their parents.|They depend of their parents.
I have lived here since last year.|I have lived here since two years ago last.
My brother and I are here.|My brother and I am here.
Each of the boys has a ball.|Each of the boys have an balls.
"""

_SERIES = """
one, two, three, four,|five|nine|two|one
two, four, six, eight,|ten|seven|three|two
ten, nine, eight, seven,|six|nine|one|ten
1, 2, 3, 4, 5,|6|9|2|1
2, 4, 6, 8,|10|7|3|5
5, 10, 15, 20,|25|21|11|40
10, 20, 30, 40,|50|41|15|90
10, 9, 8, 7,|6|9|3|12
1, 3, 5, 7,|9|8|2|20
100, 200, 300, 400,|500|150|450|401
first, second, third,|fourth|first|tenth|second
a, b, c, d,|e|k|b|z
A, B, C, D, E,|F|M|B|Z
Monday, Tuesday, Wednesday,|Thursday|Monday|Sunday|March
Thursday, Friday, Saturday,|Sunday|Tuesday|Thursday|June
January, February, March,|April|August|January|Monday
June, July, August,|September|May|June|Friday
September, October, November,|December|March|October|Sunday
spring, summer, autumn,|winter|spring|Monday|noon
north, east, south,|west|north|up|red
baby, child, teenager,|adult|egg|baby|stone
morning, noon, evening,|night|morning|winter|year
second, minute, hour,|day|second|metre|cold
small, medium,|large|small|green|slow
breakfast, lunch,|dinner|breakfast|table|winter
yesterday, today,|tomorrow|yesterday|never|always
Mercury, Venus, Earth,|Mars|Venus|London|gold
bronze, silver,|gold|bronze|blue|water
good, better,|best|good|worse|bad
big, bigger,|biggest|big|small|bag
bad, worse,|worst|bad|good|wood
I, you, he, she,|it|red|dog|over
past, present,|future|past|table|water
hundred, thousand,|million|ten|one|apple
cat, cats; dog, dogs; car,|cars|cats|car|cart
king, queen; man, woman; boy,|girl|king|boys|toy
cow, calf; dog, puppy; cat,|kitten|dog|calf|milk
hot, cold; up, down; big,|small|hot|bigger|tall
walk, walked; talk, talked; play,|played|walk|plays|talked
Paris, France; Rome, Italy; Madrid,|Spain|Rome|Paris|Japan
"""

MINI = {"mini_facts": _FACTS, "mini_grammar": _GRAMMAR, "mini_series": _SERIES}
"""Task to its items: a line each, the beginning of a text and its continuations, of which the first is right.
Where there are only two parts, they are sentences, of which the first is right."""


def write_mini_task(name: str, folder: Path) -> Path:
    """Write lm-eval's file of a task of ``MINI``; its chance level is one over the number of choices."""
    task = {
        "task": name,
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": " ",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "dataset_kwargs": {"name": name},
        "metadata": {"version": 1.0},
    }
    file = folder / f"{name}.yaml"
    file.write_text(f"{yaml.safe_dump(task)}custom_dataset: !function {__name__}.{read_mini_task.__name__}\n")
    return file


def read_mini_task(name: str, **_: object) -> dict[str, "datasets.Dataset"]:
    """Return the items of a task of ``MINI``; lm-eval calls this."""
    import datasets

    return {"test": datasets.Dataset.from_list(mini_items(name))}


def mini_items(name: str) -> list[dict[str, Any]]:
    """Return the items of a task of ``MINI``: ``text``, ``choices``, and the number of the right one.

    The right choice takes each place in turn.
    """
    items = []
    for number, line in enumerate(MINI[name].strip().splitlines()):
        parts = line.split("|")
        text, choices = (parts[0], parts[1:]) if len(parts) > 2 else ("", parts)
        answer = number % len(choices)
        choices.insert(answer, choices.pop(0))
        items.append({"text": text, "choices": choices, "answer": answer})
    return items
