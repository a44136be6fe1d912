// Updates: what goes up of a change, how it is described, and what stays behind (CodecConfig.error_feedback).

import { createHash } from "node:crypto";
import { decode, encode, halfEven } from "./codecs.js";
import { seedOf } from "./drawn.js";

const sizeOf = (shape) => shape.reduce((size, extent) => size * Number(extent), 1);

export const sha256 = (data) => createHash("sha256").update(data).digest();

export const encodingOf = (codec) => (codec.up === "sparse" ? `sparse+${codec.values}` : codec.up);

// The role of a tensor in round r is roles[(r - 1) mod len(roles)].
export const sent = (spec, round) => spec.tensors.filter((t) => t.roles[(round - 1) % t.roles.length] === "ROLE_SENT");

export const shared = (spec) => spec.tensors.filter((t) => t.roles.some((role) => role !== "ROLE_LOCAL"));

export function describe(specs, arrays, encoding, training) {
  const parts = specs.map((t) => encode(arrays[t.name], encoding, seedOf(training, t.name)));
  let offset = 0;
  const tensors = specs.map((t, i) => {
    const entry = { name: t.name, dtype: t.dtype, shape: t.shape, encoding, offset, length: parts[i].length };
    offset += parts[i].length;
    return entry;
  });
  const payload = Buffer.concat(parts);
  return { manifest: { tensors, payload_bytes: payload.length, sha256: sha256(payload) }, payload };
}

export function read(manifest, payload) {
  return Object.fromEntries(
    manifest.tensors.map((t) => {
      const data = payload.subarray(Number(t.offset), Number(t.offset) + Number(t.length));
      return [t.name, decode(data, sizeOf(t.shape), t.encoding)];
    }),
  );
}

function topK(specs, arrays, k) {
  const every = specs.flatMap((t, tensor) => Array.from(arrays[t.name], (value, i) => ({ tensor, i, size: Math.abs(value) })));
  every.sort((a, b) => b.size - a.size || a.tensor - b.tensor || a.i - b.i);
  const chosen = Object.fromEntries(specs.map((t) => [t.name, new Float32Array(arrays[t.name].length)]));
  for (const { tensor, i } of every.slice(0, k)) chosen[specs[tensor].name][i] = arrays[specs[tensor].name][i];
  return chosen;
}

// Returns manifest, payload, and the residual for each of the two things that may become of the update. `training` is the
// seed of the ticket.
export function prepare(specs, delta, residual, codec, training = 0) {
  const target = {};
  for (const { name } of specs) {
    const earlier = codec.error_feedback ? residual[name] : undefined;
    target[name] = earlier ? delta[name].map((value, i) => Math.fround(value + earlier[i])) : delta[name];
    if (!target[name].every(Number.isFinite)) throw new Error(`the change of ${name} is not finite`);
  }
  const total = specs.reduce((sum, t) => sum + sizeOf(t.shape), 0);
  const up = codec.up === "sparse" ? topK(specs, target, Math.max(1, halfEven(codec.density * total))) : target;
  const { manifest, payload } = describe(specs, up, encodingOf(codec), training);
  if (!codec.error_feedback) return { manifest, payload, ifCounted: {}, ifNot: {} };
  const arrived = read(manifest, payload);
  const left = Object.fromEntries(
    specs.map(({ name }) => [name, target[name].map((value, i) => Math.fround(value - arrived[name][i]))]),
  );
  return { manifest, payload, ifCounted: { ...residual, ...left }, ifNot: { ...residual, ...target } };
}

// The canonical form of Run.backbone_fingerprint, of tensors {name, dtype, shape, data (hexadecimal)}.
export function fingerprint(model, size, tensors) {
  const quoted = (text) =>
    JSON.stringify(text).replace(/[\u007f-\uffff]/g, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);
  const rows = [...tensors]
    .sort((a, b) => Buffer.compare(Buffer.from(a.name), Buffer.from(b.name)))
    .map(({ name, dtype, shape, data }) => {
      const digest = sha256(Buffer.from(data, "hex")).toString("hex");
      return `[${quoted(name)}, "${dtype}", [${shape.join(", ")}], "${digest}"]`;
    });
  return sha256(Buffer.from(`[${quoted(model)}, ${size ?? "null"}, [${rows.join(", ")}]]`)).toString("hex");
}
