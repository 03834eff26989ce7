"""Conversion of rows as the pipeline does it, without Beam."""

from data_pipelines.prepared import conversion


def convert(schema, rows, folder, exclude=frozenset(), **how):
    """Writes the annotations.jsonl of rows in memory; returns the number of records, and the reasons."""
    plan = conversion.Plan(schema=schema, folder=str(folder), exclude=frozenset(exclude), how=how)
    located = conversion.locate(plan, 0, rows)
    try:
        if plan.has_groups:
            for part, some in conversion.by_part(located):
                conversion.write_groups(plan, part, [some])
        else:
            conversion.write_rows(plan, 0, located)
        number = conversion.finish(plan).records
    finally:
        conversion.clear(plan)
    return number, (folder / conversion.LEFT_OUT).read_text().splitlines()
