"""World facts from common knowledge: countries, landmarks, art, music, planets, elements."""

from __future__ import annotations

from .schema import Fact
from .tables import table

# country | capital | continent | language of most people | currency ("-": not asked)
_COUNTRIES = """
France|Paris|Europe|French|euro
Spain|Madrid|Europe|Spanish|euro
Portugal|Lisbon|Europe|Portuguese|euro
Italy|Rome|Europe|Italian|euro
Germany|Berlin|Europe|German|euro
Austria|Vienna|Europe|German|euro
Greece|Athens|Europe|Greek|euro
Poland|Warsaw|Europe|Polish|zloty
Hungary|Budapest|Europe|Hungarian|forint
Romania|Bucharest|Europe|Romanian|leu
Sweden|Stockholm|Europe|Swedish|krona
Norway|Oslo|Europe|Norwegian|krone
Finland|Helsinki|Europe|Finnish|euro
Iceland|Reykjavik|Europe|Icelandic|krona
Ukraine|Kyiv|Europe|Ukrainian|hryvnia
Ireland|Dublin|Europe|English|euro
Japan|Tokyo|Asia|Japanese|yen
China|Beijing|Asia|Chinese|yuan
Thailand|Bangkok|Asia|Thai|baht
Vietnam|Hanoi|Asia|Vietnamese|dong
Mongolia|Ulaanbaatar|Asia|Mongolian|tugrik
Iran|Tehran|Asia|Persian|rial
Nepal|Kathmandu|Asia|Nepali|rupee
Bangladesh|Dhaka|Asia|Bengali|taka
Malaysia|Kuala Lumpur|Asia|-|ringgit
Egypt|Cairo|Africa|Arabic|pound
Morocco|Rabat|Africa|Arabic|dirham
Kenya|Nairobi|Africa|-|shilling
Ethiopia|Addis Ababa|Africa|-|birr
Nigeria|Abuja|Africa|-|naira
Ghana|Accra|Africa|-|cedi
Angola|Luanda|Africa|Portuguese|kwanza
Tunisia|Tunis|Africa|Arabic|dinar
Canada|Ottawa|North America|English|dollar
Cuba|Havana|North America|Spanish|peso
Brazil|Brasilia|South America|Portuguese|real
Argentina|Buenos Aires|South America|Spanish|peso
Chile|Santiago|South America|Spanish|peso
Peru|Lima|South America|-|sol
Australia|Canberra|Oceania|English|dollar
New Zealand|Wellington|Oceania|English|dollar
"""

# landmark | city
_LANDMARKS = """
the Eiffel Tower|Paris
the Colosseum|Rome
the Parthenon|Athens
the Brandenburg Gate|Berlin
the Prado Museum|Madrid
the Schonbrunn Palace|Vienna
the Forbidden City|Beijing
the Sydney Opera House|Sydney
the Statue of Liberty|New York
the Taj Mahal|Agra
the Hagia Sophia|Istanbul
the Hermitage Museum|Saint Petersburg
the Golden Gate Bridge|San Francisco
the Sagrada Familia|Barcelona
"""

# painting | painter
_PAINTINGS = """
Mona Lisa|Leonardo da Vinci
The Starry Night|Vincent van Gogh
Guernica|Pablo Picasso
The Birth of Venus|Sandro Botticelli
Girl with a Pearl Earring|Johannes Vermeer
Las Meninas|Diego Velazquez
The Scream|Edvard Munch
The Night Watch|Rembrandt
The Kiss|Gustav Klimt
The School of Athens|Raphael
"""

# work | composer
_MUSIC = """
The Magic Flute|Wolfgang Amadeus Mozart
Carmen|Georges Bizet
Aida|Giuseppe Verdi
Fidelio|Ludwig van Beethoven
Swan Lake|Pyotr Tchaikovsky
The Four Seasons|Antonio Vivaldi
Tosca|Giacomo Puccini
Parsifal|Richard Wagner
The Creation|Joseph Haydn
Messiah|George Frideric Handel
"""

# question | answer, all of them planets
_PLANETS = """
Which planet is closest to the Sun?|Mercury
Which planet is the largest?|Jupiter
Which planet is called the red planet?|Mars
Which planet did William Herschel discover?|Uranus
Which planet is farthest from the Sun?|Neptune
Which planet is the hottest?|Venus
Which planet has the widest rings?|Saturn
"""

# element | symbol
_SYMBOLS = """
gold|Au
silver|Ag
iron|Fe
copper|Cu
lead|Pb
tin|Sn
sodium|Na
potassium|K
"""


def countries() -> list[tuple[str, str]]:
    """Country and capital pairs, the places that invented lives may be set in."""
    return [(row[0], row[1]) for row in table(_COUNTRIES)]


def artwork_titles() -> set[str]:
    """Titles of paintings and music, which no invented book may have."""
    return {title for title, _ in table(_PAINTINGS) + table(_MUSIC)}


def _country_facts() -> list[Fact]:
    facts = []
    for country, capital, continent, language, currency in table(_COUNTRIES):
        facts.append(
            Fact(
                "city",
                f"What is the capital of {country}?",
                capital,
                (f"{capital} is the capital of {country}.",),
            )
        )
        facts.append(Fact("continent", f"On which continent is {country}?", continent))
        if language != "-":
            facts.append(Fact("language", f"Which language is spoken in {country}?", language))
        # A currency shared by many countries makes a poor question.
        if currency not in {"euro", "dollar", "peso"}:
            facts.append(
                Fact(
                    "currency",
                    f"What is the currency of {country}?",
                    f"The {currency}",
                    (f"People in {country} pay with the {currency}.",),
                )
            )
    return facts


def world_facts() -> list[Fact]:
    """All world facts, in a fixed order."""
    facts = _country_facts()
    for landmark, city in table(_LANDMARKS):
        facts.append(
            Fact(
                "city",
                f"In which city is {landmark}?",
                city,
                (f"{landmark[0].upper()}{landmark[1:]} stands in {city}.",),
            )
        )
    for painting, painter in table(_PAINTINGS):
        facts.append(
            Fact(
                "painter",
                f"Who painted '{painting}'?",
                painter,
                (f"{painter} painted '{painting}'.",),
            )
        )
    for work, composer in table(_MUSIC):
        facts.append(
            Fact(
                "composer",
                f"Who composed '{work}'?",
                composer,
                (f"{composer} composed '{work}'.",),
            )
        )
    for question, planet in table(_PLANETS):
        facts.append(Fact("planet", question, planet))
    for element, symbol in table(_SYMBOLS):
        facts.append(Fact("symbol", f"What is the chemical symbol of {element}?", symbol))
    return facts
