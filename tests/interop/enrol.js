// Enrolment: the token line, a PKCS #10 request for a P-256 key, and the certificate that answers it.

import { createHash, generateKeyPairSync, sign } from "node:crypto";
import { mutual, unnamed } from "./rpc.js";

export function parseToken(line) {
  const text = line.trim();
  const parts = text.split(".");
  if (parts.length !== 6 || parts[0] !== "fedpeft1") throw new Error("this is no token");
  const check = createHash("sha256").update(text.slice(0, text.lastIndexOf("."))).digest().subarray(0, 4);
  if (check.toString("base64url") !== parts[5]) throw new Error("the token is damaged");
  const [server, enrolment, authority, secret] = parts.slice(1, 5).map((part) => Buffer.from(part, "base64url"));
  return { server: server.toString(), enrolment: enrolment.toString(), authority, secret };
}

const pem = (der) => Buffer.from(`-----BEGIN CERTIFICATE-----\n${der.toString("base64")}\n-----END CERTIFICATE-----\n`);

function der(tag, ...parts) {
  const content = Buffer.concat(parts);
  const length = [];
  for (let left = content.length; left; left >>>= 8) length.unshift(left & 0xff);
  const head = content.length < 0x80 ? [content.length] : [0x80 | length.length, ...length];
  return Buffer.concat([Buffer.from([tag, ...head]), content]);
}

const ECDSA_WITH_SHA256 = der(0x30, der(0x06, Buffer.from("2a8648ce3d040302", "hex")));

// RFC 2986: version 0, an empty name, the key, no attributes; signed with ECDSA and SHA-256.
function signingRequest({ publicKey, privateKey }) {
  const key = publicKey.export({ type: "spki", format: "der" });
  const info = der(0x30, der(0x02, Buffer.from([0])), der(0x30), key, der(0xa0));
  const signature = sign("sha256", info, { key: privateKey, dsaEncoding: "der" });
  return der(0x30, info, ECDSA_WITH_SHA256, der(0x03, Buffer.from([0]), signature));
}

// Returns the server to call and the credentials to call it with.
export async function enrol(line) {
  const token = parseToken(line);
  const pair = generateKeyPairSync("ec", { namedCurve: "P-256" });
  const request = { secret: token.secret, signing_request: signingRequest(pair), software: "interop 1" };
  const authority = pem(token.authority);
  const access = unnamed(token.enrolment, authority);
  const answer = await new Promise((resolve, reject) =>
    access.Enroll(request, { deadline: Date.now() + 15_000 }, (error, given) => (error ? reject(error) : resolve(given))),
  );
  access.close();
  const key = Buffer.from(pair.privateKey.export({ type: "pkcs8", format: "pem" }));
  const trusted = answer.authority.length ? answer.authority : authority;
  return { server: answer.server || token.server, credentials: mutual(trusted, key, answer.certificate) };
}
