"""Facts from common knowledge: real authors, countries, landmarks, art, planets, elements."""

from __future__ import annotations

from forgetting.data.microworld.entities import Fact, parse_table

# author | nationality | year of birth | works ("-": unknown, disputed or not asked)
_AUTHORS = """
Jane Austen|English|1775|Pride and Prejudice;Emma
Charles Dickens|English|1812|Oliver Twist;Great Expectations
Mary Shelley|English|1797|Frankenstein
Charlotte Brontë|English|1816|Jane Eyre
Emily Brontë|English|1818|Wuthering Heights
George Eliot|English|1819|Middlemarch
Thomas Hardy|English|1840|Jude the Obscure
Virginia Woolf|English|1882|Mrs Dalloway;To the Lighthouse
George Orwell|English|1903|Animal Farm
Lewis Carroll|English|1832|Alice in Wonderland
Daniel Defoe|English|-|Robinson Crusoe
William Shakespeare|English|1564|Hamlet;Macbeth
John Milton|English|1608|Paradise Lost
Agatha Christie|English|1890|Death on the Nile
Oscar Wilde|Irish|1854|The Picture of Dorian Gray
James Joyce|Irish|1882|Ulysses
Jonathan Swift|Irish|1667|Gulliver's Travels
Bram Stoker|Irish|1847|Dracula
Robert Louis Stevenson|Scottish|1850|Treasure Island
Walter Scott|Scottish|1771|Ivanhoe
Mark Twain|American|1835|The Adventures of Tom Sawyer
Herman Melville|American|1819|Moby Dick
Nathaniel Hawthorne|American|1804|The Scarlet Letter
Louisa May Alcott|American|1832|Little Women
Ernest Hemingway|American|1899|The Old Man and the Sea
John Steinbeck|American|1902|The Grapes of Wrath
William Faulkner|American|1897|The Sound and the Fury
Jack London|American|1876|White Fang
Edgar Allan Poe|American|1809|The Raven
Victor Hugo|French|1802|Les Miserables
Alexandre Dumas|French|1802|The Three Musketeers
Gustave Flaubert|French|1821|Madame Bovary
Jules Verne|French|1828|Around the World in Eighty Days
Marcel Proust|French|1871|In Search of Lost Time
Albert Camus|French|1913|The Plague
Voltaire|French|1694|Candide
Leo Tolstoy|Russian|1828|War and Peace;Anna Karenina
Fyodor Dostoevsky|Russian|1821|Crime and Punishment;The Idiot
Anton Chekhov|Russian|1860|The Cherry Orchard
Ivan Turgenev|Russian|1818|Fathers and Sons
Alexander Pushkin|Russian|1799|Eugene Onegin
Johann Wolfgang von Goethe|German|1749|Faust
Friedrich Schiller|German|1759|William Tell
Thomas Mann|German|1875|The Magic Mountain
Hermann Hesse|-|1877|Siddhartha
Franz Kafka|-|1883|The Trial
Stefan Zweig|Austrian|1881|Chess Story
Dante Alighieri|Italian|-|The Divine Comedy
Niccolo Machiavelli|Italian|1469|The Prince
Umberto Eco|Italian|1932|The Name of the Rose
Miguel de Cervantes|Spanish|1547|Don Quixote
Gabriel Garcia Marquez|Colombian|1927|One Hundred Years of Solitude
Pablo Neruda|Chilean|1904|Twenty Love Poems
Jorge Luis Borges|Argentine|1899|The Aleph
Henrik Ibsen|Norwegian|1828|Peer Gynt
Knut Hamsun|Norwegian|1859|Hunger
August Strindberg|Swedish|1849|Miss Julie
Astrid Lindgren|Swedish|1907|Pippi Longstocking
Hans Christian Andersen|Danish|1805|The Little Mermaid
Homer|Greek|-|The Odyssey
Sophocles|Greek|-|Antigone
Chinua Achebe|Nigerian|1930|Things Fall Apart
Rabindranath Tagore|Indian|1861|Gitanjali
Murasaki Shikibu|Japanese|-|The Tale of Genji
Natsume Soseki|Japanese|1867|Kokoro
Yasunari Kawabata|Japanese|1899|Snow Country
"""


def _author_rows() -> list[tuple[str, str, str, list[str]]]:
    rows = []
    for name, nationality, year, works in parse_table(_AUTHORS):
        rows.append((name, nationality, year, works.split(";")))
    return rows


def real_names() -> set[str]:
    """Return the names of real authors, which invented authors must not have."""
    return {name for name, *_ in _author_rows()}


def real_titles() -> set[str]:
    """Return the titles of real books, which invented books must not have."""
    return {title for *_, works in _author_rows() for title in works}


def author_facts() -> list[Fact]:
    """Return all facts on real authors, in a fixed order."""
    facts = []
    for name, nationality, year, works in _author_rows():
        for work in works:
            facts.append(Fact("author", f"Who wrote '{work}'?", name, (f"{name} wrote '{work}'.",)))
        if nationality != "-":
            facts.append(
                Fact(
                    "nationality",
                    f"What was the nationality of {name}?",
                    nationality,
                )
            )
        if year != "-":
            facts.append(
                Fact(
                    "birth",
                    f"In which year was {name} born?",
                    year,
                    (f"{name} was born in {year}.",),
                )
            )
    return facts


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
    """Return pairs of country and capital, the places of invented lives."""
    return [(row[0], row[1]) for row in parse_table(_COUNTRIES)]


def artwork_titles() -> set[str]:
    """Return the titles of paintings and music, which invented books must not have."""
    return {title for title, _ in parse_table(_PAINTINGS) + parse_table(_MUSIC)}


def _country_facts() -> list[Fact]:
    facts = []
    for country, capital, continent, language, currency in parse_table(_COUNTRIES):
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
        # Many countries share these currencies, so they would make a poor question.
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
    """Return all facts on the world, in a fixed order."""
    facts = _country_facts()
    for landmark, city in parse_table(_LANDMARKS):
        facts.append(
            Fact(
                "city",
                f"In which city is {landmark}?",
                city,
                (f"{landmark[0].upper()}{landmark[1:]} stands in {city}.",),
            )
        )
    for painting, painter in parse_table(_PAINTINGS):
        facts.append(
            Fact(
                "painter",
                f"Who painted '{painting}'?",
                painter,
                (f"{painter} painted '{painting}'.",),
            )
        )
    for work, composer in parse_table(_MUSIC):
        facts.append(
            Fact(
                "composer",
                f"Who composed '{work}'?",
                composer,
                (f"{composer} composed '{work}'.",),
            )
        )
    for question, planet in parse_table(_PLANETS):
        facts.append(Fact("planet", question, planet))
    for element, symbol in parse_table(_SYMBOLS):
        facts.append(Fact("symbol", f"What is the chemical symbol of {element}?", symbol))
    return facts
