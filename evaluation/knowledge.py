"""What a pretrained base can be asked: facts, words, grammar and small sums, written for this project.

The embedded base's general tasks are its own school, and a pretrained base answers hardly any of them in their form.
Here a question is asked in the base's prompt template, and an answer is right if it contains an accepted one as a word.
An item whose answer names every choice ("It is hot or cold") is wrong.
"""

import random
import re
from collections.abc import Iterable, Mapping
from typing import Any

from evaluation import EvaluationError
from evaluation.tasks import Item

_KINDS = {
    "capitals": ("What is the capital of {}?", """
        France Paris, Germany Berlin, Italy Rome, Spain Madrid, Japan Tokyo, China Beijing, Russia Moscow,
        England London, Egypt Cairo, Greece Athens, Portugal Lisbon, Austria Vienna, Ireland Dublin, Norway Oslo,
        Sweden Stockholm, Finland Helsinki, Denmark Copenhagen, Poland Warsaw, Hungary Budapest, Turkey Ankara,
        Canada Ottawa, Cuba Havana, Peru Lima, Chile Santiago, Kenya Nairobi, Iran Tehran, Iraq Baghdad,
        Thailand Bangkok, India Delhi, Belgium Brussels, Ukraine Kyiv|Kiev, Argentina Buenos_Aires, Australia Canberra,
        Brazil Brasília|Brasilia"""),
    "places": ("In which country is {}?", """
        the_Eiffel_Tower France, the_Great_Wall China, the_Colosseum Italy, the_city_of_Munich Germany, Big_Ben
        England|United_Kingdom|UK, Mount_Fuji Japan, the_Taj_Mahal India, the_Kremlin Russia, the_Acropolis Greece,
        the_city_of_Barcelona Spain, Machu_Picchu Peru, the_Grand_Canyon United_States|USA|America, the_city_of_Toronto
        Canada, the_city_of_Sydney Australia, the_city_of_Rio_de_Janeiro Brazil, the_city_of_Istanbul Turkey,
        the_city_of_Zurich Switzerland, the_city_of_Amsterdam Netherlands, the_city_of_Cape_Town South_Africa,
        the_Sphinx Egypt, the_city_of_Seoul Korea, the_city_of_Hanoi Vietnam, the_city_of_Mumbai India"""),
    "opposites": ("What is the opposite of {}? Answer with one word.", """
        hot cold|cool, big small|little, day night, up down, left right|wrong, fast slow, young old, happy sad|unhappy,
        light dark|heavy, open closed|close|shut, early late, full empty, high low, long short, hard soft|easy,
        rich poor, strong weak, wet dry, black white, good bad|evil, clean dirty, near far, true false, first last,
        begin end|finish|stop, love hate, win lose, always never, inside outside, buy sell, push pull, north south,
        east west, thick thin, loud quiet|soft, war peace, friend enemy|foe"""),
    "plurals": ("What is the plural of the word {}?", """
        child children, man men, woman women, mouse mice, foot feet, tooth teeth, goose geese, person people, city
        cities, baby babies, knife knives, leaf leaves, wolf wolves, box boxes, bus buses, dog dogs, house houses,
        church churches, story stories, life lives, potato potatoes, tomato tomatoes, shelf shelves, party parties,
        glass glasses, sheep sheep, ox oxen, key keys"""),
    "past_tense": ("What is the past tense of the verb {}?", """
        go went, see saw, eat ate, take took, come came, run ran, give gave, write wrote, speak spoke, buy bought,
        think thought, bring brought, teach taught, catch caught, drink drank, sing sang, swim swam, begin began, know
        knew, fly flew, grow grew, break broke, make made, find found, leave left, feel felt, sleep slept, walk walked,
        play played, study studied, stop stopped, sell sold"""),
    "colors": ("What color is {}?", """
        grass green, the_sky_on_a_clear_day blue, snow white, coal black, blood red, a_ripe_banana yellow, an_orange
        orange, the_sun yellow|white|orange, milk white, a_ripe_tomato red, chocolate brown, an_emerald green, a_ruby
        red, a_sapphire blue, a_flamingo pink, a_carrot orange, a_polar_bear white, a_crow black, a_lemon yellow,
        a_fire_engine red, a_frog green, broccoli green"""),
    "young_animals": ("What is a young {} called?", """
        dog puppy|pup, cat kitten, cow calf, horse foal|colt|filly, sheep lamb, pig piglet, goat kid, chicken chick,
        duck duckling, bear cub, lion cub, kangaroo joey, deer fawn, swan cygnet, goose gosling, frog tadpole|froglet,
        wolf pup|puppy|cub, elephant calf, butterfly caterpillar|larva, owl owlet"""),
    "kinds": ("Is {} an animal, a plant or a tool?", """
        a_dog animal, a_hammer tool, an_oak plant, a_rose plant, a_horse animal, a_saw tool, a_screwdriver tool,
        a_tulip plant, a_whale animal, a_tiger animal, a_cactus plant, a_wrench tool, a_rabbit animal, a_fern plant,
        an_axe tool, an_eagle animal, a_shovel tool, a_sunflower plant, a_shark animal, a_drill tool,
        an_elephant animal, a_pine_tree plant"""),
    "what_follows": ("What comes after {}?", """
        Monday Tuesday, Tuesday Wednesday, Wednesday Thursday, Thursday Friday, Friday Saturday, Saturday Sunday, Sunday
        Monday, January February, February March, March April, April May, May June, June July, July August, August
        September, September October, October November, November December, spring summer, summer autumn|fall,
        autumn winter, the_letter_A B, the_letter_M N, the_number_9 10|ten, the_number_19 20|twenty, the_number_99
        100|hundred"""),
    "how_many": ("How many {}?", """
        days_are_there_in_a_week 7|seven, months_are_there_in_a_year 12|twelve, hours_are_there_in_a_day
        24|twenty-four, minutes_are_there_in_an_hour 60|sixty, seconds_are_there_in_a_minute 60|sixty,
        legs_does_a_spider_have 8|eight, legs_does_a_dog_have 4|four, legs_does_an_insect_have 6|six,
        wheels_does_a_bicycle_have 2|two, wheels_does_a_car_have 4|four, sides_does_a_triangle_have 3|three,
        sides_does_a_square_have 4|four, sides_does_a_hexagon_have 6|six, letters_are_in_the_English_alphabet
        26|twenty-six, fingers_does_a_hand_have 5|five, continents_are_there 7|seven, planets_orbit_the_sun 8|eight,
        days_are_there_in_a_year 365, cents_are_there_in_a_dollar 100|hundred, strings_does_a_violin_have 4|four,
        players_does_a_soccer_team_have_on_the_field 11|eleven, arms_does_an_octopus_have 8|eight"""),
    "sums": ("What is {}?", """
        1_+_1 2|two, 2_+_2 4|four, 3_+_4 7|seven, 5_+_5 10|ten, 6_+_3 9|nine, 7_+_2 9|nine, 8_+_4 12|twelve, 9_+_6
        15|fifteen, 10_+_10 20|twenty, 12_+_7 19|nineteen, 20_+_30 50|fifty, 15_+_5 20|twenty, 5_-_2 3|three, 9_-_4
        5|five, 10_-_3 7|seven, 8_-_8 0|zero, 20_-_10 10|ten, 2_×_3 6|six, 4_×_5 20|twenty, 3_×_3 9|nine, 10_×_10
        100|hundred, 5_×_6 30|thirty, 7_×_7 49, half_of_10 5|five, 100_-_1 99"""),
    "sentences": ("Complete the sentence with one word: {} ...", """
        The_sun_rises_in_the east|morning, Birds_can fly|sing, Fish_live_in water|the|oceans|rivers, We_see_with_our
        eyes, We_hear_with_our ears, Bees_make honey, Cows_give_us milk, A_doctor_works_in_a hospital|clinic, You_read_a
        book, At_night_we sleep|dream, Ice_is_frozen water, Bread_is_made_from flour|wheat|dough, A_king_wears_a crown,
        Rain_falls_from_the sky|clouds, In_winter_it_is cold|snowing|chilly, Fire_is hot|burning|dangerous,
        A_farmer_works_on_a farm|field, Two_plus_two_is four|4, The_opposite_of_yes_is no,
        An_apple_a_day_keeps_the_doctor away"""),
    "science": ("What is the chemical symbol of {}?", """
        gold Au, silver Ag, iron Fe, oxygen O|O2, hydrogen H|H2, carbon C, helium He, sodium Na, copper Cu, lead Pb,
        nitrogen N|N2, calcium Ca, potassium K, chlorine Cl|Cl2, zinc Zn, neon Ne, water H2O|H₂O, carbon_dioxide
        CO2|CO₂"""),
    "people": ("Who {}?", """
        wrote_Romeo_and_Juliet Shakespeare, wrote_Hamlet Shakespeare, painted_the_Mona_Lisa Leonardo|Vinci,
        was_the_first_president_of_the_United_States Washington, developed_the_theory_of_relativity Einstein,
        discovered_gravity_when_an_apple_fell Newton, invented_the_telephone Bell, wrote_Harry_Potter Rowling,
        was_the_first_person_on_the_moon Armstrong, wrote_the_Odyssey Homer, invented_the_light_bulb Edison,
        painted_The_Starry_Night Gogh, wrote_Pride_and_Prejudice Austen, discovered_America_in_1492 Columbus,
        wrote_Don_Quixote Cervantes, proposed_evolution_by_natural_selection Darwin, wrote_1984 Orwell,
        composed_the_Moonlight_Sonata Beethoven"""),
}  # fmt: skip
NAMES = frozenset(_KINDS)


def retention_items(per_kind: int, seed: int) -> list[Item]:
    """At most `per_kind` questions of every kind, drawn with `seed`."""
    rng = random.Random(f"knowledge-{seed}")
    items = []
    for kind, (question, table) in _KINDS.items():
        pairs = [pair.split() for pair in table.split(",")]
        choices = {answer for _, answer in pairs if answer in question}
        for number, (subject, accepted) in enumerate(rng.sample(pairs, min(per_kind, len(pairs)))):
            answers = accepted.replace("_", " ").split("|")
            prompt = question.format(subject.replace("_", " "))
            truth = {"accepted": answers, "other_choices": sorted(choices - {*answers})}
            items.append(Item(f"retention-{kind}-{number:04d}", kind, prompt, answers[0], truth))
    if len({item.prompt for item in items}) < len(items):
        raise EvaluationError("expected different questions in the retention suite, got some twice")
    return items


def is_asked(items: Iterable[str]) -> bool:
    """Whether retention items with these ids are of this suite."""
    return any(item.split("-")[1] in NAMES for item in items)


def is_right(truth: Mapping[str, Any], answer: str) -> bool:
    """Whether an answer has an accepted word and none of the other choices."""

    def has(words: Iterable[str]) -> bool:
        return any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", answer, re.IGNORECASE) for word in words)

    return has(truth["accepted"]) and not has(truth["other_choices"])
