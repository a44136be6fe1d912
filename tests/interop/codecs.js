// The encodings of tensor.proto: flat float32 values to bytes and back. Throws on whatever a server must refuse.

const halfEven = (x) => {
  const floor = Math.floor(x);
  const rest = x - floor;
  return rest > 0.5 || (rest === 0.5 && floor % 2 === 1) ? floor + 1 : floor;
};

const bitsOf = (value) => {
  const view = new DataView(new ArrayBuffer(4));
  view.setFloat32(0, value);
  return view.getUint32(0);
};

const floatOf = (bits) => {
  const view = new DataView(new ArrayBuffer(4));
  view.setUint32(0, bits);
  return view.getFloat32(0);
};

const exponentOf = (magnitude) => {
  const view = new DataView(new ArrayBuffer(8));
  view.setFloat64(0, magnitude);
  return ((view.getUint32(0) >>> 20) & 0x7ff) - 1023;
};

function toHalf(value) {
  const sign = bitsOf(value) >>> 31 ? 0x8000 : 0;
  const magnitude = Math.min(Math.abs(value), 65504);
  if (magnitude === 0) return sign;
  const exponent = Math.max(exponentOf(magnitude), -14);
  return sign | (((exponent + 14) << 10) + halfEven(magnitude / 2 ** (exponent - 10)));
}

function ofHalf(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >>> 10) & 0x1f;
  const fraction = bits & 0x3ff;
  return sign * (exponent ? (1024 + fraction) * 2 ** (exponent - 25) : fraction * 2 ** -24);
}

function toBrain(value) {
  const bits = bitsOf(value);
  const magnitude = Math.min(bits & 0x7fffffff, 0x7f7f0000);
  const rounded = (magnitude + 0x7fff + ((magnitude >>> 16) & 1)) >>> 16;
  return ((bits >>> 16) & 0x8000) | rounded;
}

const DENSE = {
  float32: { width: 4, narrow: bitsOf, widen: floatOf, exponent: 0x7f800000 },
  float16: { width: 2, narrow: toHalf, widen: ofHalf, exponent: 0x7c00 },
  bfloat16: { width: 2, narrow: toBrain, widen: (bits) => floatOf((bits << 16) >>> 0), exponent: 0x7f80 },
};

const isZero = (bits, width) => (width === 4 ? bits & 0x7fffffff : bits & 0x7fff) === 0;

function writeBits(all, width) {
  const data = Buffer.alloc(all.length * width);
  all.forEach((bits, i) => (width === 4 ? data.writeUInt32LE(bits, 4 * i) : data.writeUInt16LE(bits, 2 * i)));
  return data;
}

function readBits(data, { width, exponent }) {
  if (data.length % width) throw new Error("values that are cut short");
  return Array.from({ length: data.length / width }, (_, i) => {
    const bits = width === 4 ? data.readUInt32LE(4 * i) : data.readUInt16LE(2 * i);
    if ((bits & exponent) === exponent) throw new Error(`value ${i} is not finite`);
    return bits;
  });
}

function varint(number) {
  const bytes = [];
  for (; number >= 0x80; number = Math.floor(number / 128)) bytes.push((number % 128) | 0x80);
  return [...bytes, number];
}

function readVarint(data, at) {
  let number = 0;
  for (let taken = 1; taken <= 5; taken++) {
    if (at + taken > data.length) throw new Error("a number that does not end");
    const byte = data[at + taken - 1];
    number += (byte & 0x7f) * 128 ** (taken - 1);
    if (byte < 0x80) {
      if (taken > 1 && byte === 0) throw new Error("a number with more bytes than it needs");
      return [number, at + taken];
    }
  }
  throw new Error("a number of more than 5 bytes");
}

function positionsOf(kept, n) {
  const gaps = [];
  let last = -1;
  for (const position of kept) {
    gaps.push(...varint(position - last - 1));
    last = position;
  }
  if (gaps.length <= Math.ceil(n / 8)) return [0, gaps];
  const mask = new Array(Math.ceil(n / 8)).fill(0);
  for (const position of kept) mask[position >>> 3] |= 1 << (position & 7);
  return [1, mask];
}

function encodeSparse(values, dense) {
  const bits = Array.from(values, dense.narrow);
  const kept = bits.flatMap((each, i) => (isZero(each, dense.width) ? [] : [i]));
  const [mode, positions] = positionsOf(kept, values.length);
  const head = Buffer.from([mode, ...varint(kept.length), ...positions]);
  return Buffer.concat([head, writeBits(kept.map((i) => bits[i]), dense.width)]);
}

function decodeSparse(data, n, dense) {
  if (data[0] !== 0 && data[0] !== 1) throw new Error("the mode is neither 0 nor 1");
  let [count, at] = readVarint(data, 1);
  const kept = [];
  if (data[0] === 0) {
    for (let last = -1; kept.length < count; ) {
      let gap;
      [gap, at] = readVarint(data, at);
      kept.push((last += gap + 1));
    }
  } else {
    for (let i = 0; i < 8 * Math.ceil(n / 8); i++) if ((data[at + (i >>> 3)] >>> (i & 7)) & 1) kept.push(i);
    at += Math.ceil(n / 8);
  }
  if (kept.length !== count || kept.some((i) => i >= n)) throw new Error("positions that do not fit");
  const bits = readBits(data.subarray(at), dense);
  if (bits.length !== count || bits.some((each) => isZero(each, dense.width))) throw new Error("kept values that do not fit");
  const values = new Float32Array(n);
  kept.forEach((i, k) => (values[i] = dense.widen(bits[k])));
  if (!encodeSparse(values, dense).equals(data)) throw new Error("the other mode is as short");
  return values;
}

export function encode(values, encoding) {
  const [form, kept] = encoding.split("+");
  if (form === "sparse") return encodeSparse(values, DENSE[kept]);
  return writeBits(Array.from(values, DENSE[form].narrow), DENSE[form].width);
}

export function decode(data, n, encoding) {
  const [form, kept] = encoding.split("+");
  if (form === "sparse") return decodeSparse(data, n, DENSE[kept]);
  const bits = readBits(data, DENSE[form]);
  if (bits.length !== n) throw new Error(`${bits.length} values, not ${n}`);
  return Float32Array.from(bits, DENSE[form].widen);
}

export { halfEven };
