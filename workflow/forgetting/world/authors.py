"""Real authors from common knowledge: works, nationality, year of birth."""

from __future__ import annotations

from .schema import Fact
from .tables import table

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


def _rows() -> list[tuple[str, str, str, list[str]]]:
    rows = []
    for name, nationality, year, works in table(_AUTHORS):
        rows.append((name, nationality, year, works.split(";")))
    return rows


def real_names() -> set[str]:
    """Names that no invented author may bear."""
    return {name for name, *_ in _rows()}


def real_titles() -> set[str]:
    """Titles that no invented book may have."""
    return {title for *_, works in _rows() for title in works}


def author_facts() -> list[Fact]:
    """All facts on real authors, in a fixed order."""
    facts = []
    for name, nationality, year, works in _rows():
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
