"use strict";
const $ = (id) => document.getElementById(id);
const SHOWN = 480, MOST_PIXELS = 1024;
const ROWS = [
  ["Vision tokens in the prompt", (run) => run.report?.vision_tokens, number, "not saved"],
  ["Vision tokens, mean over the layers", meanKept, number],
  ["Rows run in the prefill, all layers", (run) => run.report?.layer_tokens, number],
  ["Prefill compute", (run) => run.report?.prefill_flops, flops],
  ["KV blocks held", (run) => run.report?.kv_blocks, number],
  ["KV cache held", (run) => run.report?.kv_bytes, bytes],
  ["Time to first token", (run) => run.firstMs, milliseconds],
  ["Time to the end", (run) => run.totalMs, milliseconds],
  ["Tokens answered", (run) => run.usage?.completion_tokens, number, "not saved"],
];
/* Of the pruned run, and what it would be with every token: the engine knows that without asking again, but for times. */
const SAVINGS = [
  ["KV cache", (run) => run.report?.kv_bytes, (run) => run.report?.kv_bytes_dense, bytes],
  ["Prefill compute", (run) => run.report?.prefill_flops, (run) => run.report?.prefill_flops_dense, flops],
  ["Vision tokens, mean", meanKept, (run) => run.report?.vision_tokens, number],
  ["First token", (run) => run.firstMs, () => runs.off?.firstMs, milliseconds],
];
const sent = document.createElement("canvas");
let model = null, own = null, key = "", given = null, video = null, runs = {}, aborter = null, isWarm = false;
