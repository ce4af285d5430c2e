"""The page and its figures: tables in, one HTML file and SVG and PNG figures out."""
