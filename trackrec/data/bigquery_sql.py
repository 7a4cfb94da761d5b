"""Ibis expressions as BigQuery's SQL, where Ibis's own compiler lacks a rule or writes what BigQuery refuses."""

from typing import Any

import ibis.expr.datatypes as dt
import ibis.expr.operations as ops
import sqlglot as sg
import sqlglot.expressions as sge
from ibis import util
from ibis.backends.sql.compilers.bigquery import BigQueryCompiler
from ibis.expr.types import Table


class _Compiler(BigQueryCompiler):
    __slots__ = ()

    def visit_HexDigest(self, op: ops.HexDigest, *, arg: sge.Expression, how: str) -> sge.Expression:
        return self.f.to_hex(self.f[how](arg))

    def visit_Cast(self, op: ops.Cast, *, arg: sge.Expression, to: dt.DataType) -> sge.Expression:
        text: sge.Expression = super().visit_Cast(op, arg=arg, to=to)
        if not (op.arg.dtype.is_floating() and to.is_string()):
            return text
        # The other engines write 5.0 where BigQuery writes 5.
        return self.f.regexp_replace(text, r"^(-?[0-9]+)$", r"\1.0")

    def visit_ArraySort(self, op: ops.ArraySort, *, arg: sge.Expression) -> sge.Expression:
        element = op.arg.dtype.value_type
        if not element.is_struct():
            return super().visit_ArraySort(op, arg=arg)
        # BigQuery orders no structs.
        name = util.gen_name("bq_arr")
        fields = [sge.column(field, table=name, quoted=True) for field in element.names]
        return self.f.array(sg.select(name).from_(self._unnest(arg, as_=name)).order_by(*fields))

    def visit_WindowFunction(self, op: ops.WindowFunction, *, func: sge.Expression, **frame: Any) -> sge.Expression:
        if isinstance(op.func, ops.ArrayCollect):
            # OVER goes with no other clause of ARRAY_AGG; what is collected over a window here is never null.
            func = func.transform(lambda node: node.this if isinstance(node, sge.IgnoreNulls) else node)
        return super().visit_WindowFunction(op, func=func, **frame)


_COMPILER = _Compiler()


def compiled(rows: Table) -> str:
    """`rows` as one SELECT."""
    return _COMPILER.to_sqlglot(rows).transform(_amended).sql(dialect="bigquery", pretty=True)


def _amended(node: sge.Expression) -> sge.Expression:
    if isinstance(node, sge.Window) and (order := node.args.get("order")) is not None:
        # There is no NULLS LAST within a window (what is ordered by there holds no null, or its nulls apart).
        for key in order.expressions:
            key.set("nulls_first", not key.args.get("desc"))
    if isinstance(node, sge.Array) and node.expressions and isinstance(node.expressions[0], sge.Select):
        # The elements of ARRAY(SELECT ... FROM UNNEST(...)) come in no order but a stated one.
        select = node.expressions[0]
        unnest = select.find(sge.Unnest)
        if unnest is not None and select.args.get("order") is None:
            offset = unnest.args.get("offset") or sg.to_identifier(util.gen_name("offset"))
            unnest.set("offset", offset)
            select.order_by(sge.column(offset.name), copy=False)
    if isinstance(node, sge.Select):
        # Left to the generator, an array would be joined with the numbers of its elements first: n² rows for n.
        for place in [column for column in node.expressions if isinstance(column.unalias(), sge.Explode)]:
            table, name = util.gen_name("unnested"), place.alias
            array = sge.Unnest(
                expressions=[place.unalias().this], alias=sge.TableAlias(columns=[sg.to_identifier(table)])
            )
            place.replace(sge.column(table).as_(name, quoted=True))
            node.join(array, join_type="cross", copy=False)
    return node
