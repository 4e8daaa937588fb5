"""Functions that the generated dialogues declare, ask for and answer with."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any


def _words(text: str) -> list[str]:
    return text.split()


POOLS: dict[str, list[str]] = {
    "city": _words(
        "Oslo Lima Cairo Paris Kyoto Quito Delhi Rome Berlin Madrid Lisbon Vienna Prague Warsaw "
        "Dublin Athens Nairobi Accra Dakar Tunis Lagos Hanoi Seoul Osaka Manila Jakarta Sydney "
        "Perth Auckland Toronto Boston Chicago Denver Austin Miami Havana Bogota Santiago Geneva "
        "Zurich Munich Hamburg Lyon Porto Seville Turin Naples Riga Tallinn Helsinki Bergen"
    ),
    "person": _words(
        "Ada Alan Grace Edsger Barbara Donald Radia Ken Dennis Margaret Linus Guido Hedy Katherine "
        "Tim Anita Niklaus Frances John Mary Omar Lena Hugo Nora Ivan Maya Leo Zoe Sam Ines Kofi "
        "Amara Yuki Hana Raj Priya Chen Mei Lars Freya Diego Lucia Tariq Layla Emil Clara Felix"
    ),
    "item": _words(
        "lamp chair table kettle teapot spoon ladder bucket hammer saw rope tent boat bicycle piano "
        "violin camera radio clock mirror carpet pillow blanket basket bottle candle pencil ruler "
        "notebook stapler printer monitor keyboard cable battery wheel engine mango apple pear plum "
        "melon carrot onion pepper bean bread cheese honey coffee tea"
    ),
    "colour": _words("red blue green yellow orange purple brown black white grey pink silver"),
    "language": _words("French German Spanish Italian Dutch Polish Turkish Japanese Korean Hindi"),
    "day": _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    "sky": _words("sunny cloudy rainy windy foggy stormy clear snowy"),
    "currency": _words("euro dollar yen pound franc krone rupee peso real won"),
    "room": _words("kitchen hall office cellar attic studio library garage garden bedroom"),
    "state": _words("open closed ready busy waiting finished"),
    "hour": [f"{h:02}:{m:02}" for h in range(24) for m in (0, 15, 30, 45)],
}
NUMBERS = {"number": 99, "degrees": 35, "amount": 900, "price": 500, "minutes": 90, "id": 9999}


@dataclass(frozen=True, slots=True)
class Function:
    """One function: how it is declared, how people ask for it, what comes back."""

    name: str
    purpose: str
    arguments: tuple[str, ...]  # names of pools; the pool is also the argument's name
    requests: tuple[str, ...]
    results: tuple[str, ...]
    answer: str

    def declaration(self) -> dict[str, Any]:
        """The OpenAI form, as a chat template receives it in `tools`."""
        properties = {
            name: {"type": "integer" if name in NUMBERS else "string"} for name in self.arguments
        }
        parameters = {
            "type": "object",
            "properties": properties,
            "required": list(self.arguments),
        }
        function = {"name": self.name, "description": self.purpose, "parameters": parameters}
        return {"type": "function", "function": function}

    def call(self, values: dict[str, Any]) -> str:
        """The call as text, in the form of mlx-lm's `json_tools` parser."""
        body = {"name": self.name, "arguments": {name: values[name] for name in self.arguments}}
        return f"<tool_call>\n{json.dumps(body)}\n</tool_call>"


def _f(
    name: str, purpose: str, arguments: str, requests: str, results: str, answer: str
) -> Function:
    return Function(
        name,
        purpose,
        tuple(arguments.split()),
        tuple(requests.split(" | ")),
        tuple(results.split()),
        answer,
    )


FUNCTIONS = [
    _f(
        "get_weather",
        "Current weather in a city",
        "city",
        "What is the weather in {city}? | How is the weather in {city} today? | Weather for {city}, please.",
        "sky degrees",
        "It is {sky} in {city}, {degrees} degrees.",
    ),
    _f(
        "get_time",
        "Local time in a city",
        "city",
        "What time is it in {city}? | Tell me the local time in {city}.",
        "hour",
        "It is {hour} in {city}.",
    ),
    _f(
        "find_flight",
        "Next flight to a city on a day",
        "city day",
        "Find a flight to {city} on {day}. | I want to fly to {city} next {day}.",
        "hour price",
        "A flight to {city} leaves on {day} at {hour} for {price} euro.",
    ),
    _f(
        "book_table",
        "Book a table in a restaurant",
        "person number hour",
        "Book a table for {number} at {hour}, name {person}. | {person} needs a table for {number} people at {hour}.",
        "id",
        "The table for {person} is booked for {hour}, number {id}.",
    ),
    _f(
        "send_message",
        "Send a short message",
        "person item",
        "Tell {person} that the {item} is here. | Send {person} a message about the {item}.",
        "state",
        "The message to {person} about the {item} is {state}.",
    ),
    _f(
        "add_to_list",
        "Add things to the shopping list",
        "item number",
        "Put {number} of {item} on my shopping list. | Add {item} to the list, {number} of them.",
        "amount",
        "{item} is on the list, which now has {amount} entries.",
    ),
    _f(
        "get_price",
        "Price of an item",
        "item",
        "How much is a {item}? | What does the {item} cost? | Look up the price of a {item}.",
        "price",
        "The {item} costs {price} euro.",
    ),
    _f(
        "check_stock",
        "How many pieces are in stock",
        "item colour",
        "Do we have the {item} in {colour}? | Is there a {colour} {item} in stock?",
        "amount",
        "There are {amount} pieces of the {colour} {item} in stock.",
    ),
    _f(
        "order_item",
        "Order an item",
        "item number",
        "Order {number} pieces of the {item}. | Please buy the {item}, {number} pieces.",
        "id day",
        "The order {id} for the {item} arrives on {day}.",
    ),
    _f(
        "convert_money",
        "Convert an amount to another currency",
        "amount currency",
        "Convert {amount} euro to the {currency}. | What are {amount} euro in {currency}?",
        "price",
        "{amount} euro are {price} in {currency}.",
    ),
    _f(
        "set_alarm",
        "Set an alarm",
        "hour day",
        "Wake me at {hour} on {day}. | Set an alarm for {day} at {hour}.",
        "state",
        "The alarm for {day} at {hour} is {state}.",
    ),
    _f(
        "start_timer",
        "Start a timer",
        "minutes",
        "Start a timer of {minutes} minutes. | Remind me in {minutes} minutes.",
        "state",
        "The timer of {minutes} minutes is {state}.",
    ),
    _f(
        "switch_light",
        "Set the light of a room",
        "room colour",
        "Make the light in the {room} {colour}. | Set the {room} to {colour} light.",
        "state",
        "The light in the {room} is {colour} now.",
    ),
    _f(
        "set_heating",
        "Set the temperature of a room",
        "room degrees",
        "Heat the {room} to {degrees} degrees. | Set the {room} to {degrees} degrees.",
        "minutes",
        "The {room} will have {degrees} degrees in {minutes} minutes.",
    ),
    _f(
        "open_door",
        "Open or close a door",
        "room",
        "Open the door of the {room}. | Is the door of the {room} open?",
        "state",
        "The door of the {room} is {state}.",
    ),
    _f(
        "find_person",
        "Where a person is",
        "person",
        "Where is {person}? | Which room is {person} in? | Find {person} for me.",
        "room",
        "{person} is in the {room}.",
    ),
    _f(
        "get_calendar",
        "Appointments of a person on a day",
        "person day",
        "What does {person} do on {day}? | Is {person} free on {day}?",
        "number hour",
        "{person} has {number} appointments on {day}, the first at {hour}.",
    ),
    _f(
        "translate_word",
        "Translate a word",
        "item language",
        "What is {item} in {language}? | Translate {item} to {language}.",
        "id",
        "The word {item} has the entry {id} in the {language} dictionary.",
    ),
    _f(
        "track_parcel",
        "Where a parcel is",
        "id",
        "Where is parcel {id}? | Track the parcel {id}. | Has parcel {id} arrived?",
        "city day",
        "Parcel {id} is in {city} and arrives on {day}.",
    ),
    _f(
        "open_ticket",
        "Open a support ticket",
        "person item",
        "{person} says the {item} is broken, open a ticket. | Open a ticket for {person}: the {item} is broken.",
        "id",
        "Ticket {id} is open for {person} and the {item}.",
    ),
]


def values(names: tuple[str, ...], rng: random.Random) -> dict[str, Any]:
    """One value for each pool named."""
    return {
        name: rng.randint(1, NUMBERS[name]) if name in NUMBERS else rng.choice(POOLS[name])
        for name in names
    }
